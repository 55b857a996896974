"""What the providers of the family `linear` are given, and the losses that they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

IGNORE_INDEX = -100
BETA = 0.02  # log-probs of whole responses differ by tens of nats; so no pair is saturated

# policy: DPO against a reference of zero log-probs, as with precomputed ones; gradients of hidden states and weight.
# reference: DPO with the reference's hidden states and head, too. frozen: as policy, without the weight's gradient.
# nll: the mean cross entropy, for those that take one upstream gradient for all tokens only.
Task = Literal["policy", "reference", "frozen", "nll"]


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case."""

    task: Task
    hidden: Tensor  # [2B, T, D], chosen and then rejected; a leaf that requires a gradient
    weight: Tensor  # [V, D], a leaf; requires a gradient unless the task is "frozen"
    labels: Tensor  # [2B, T] int64, IGNORE_INDEX where not scored
    ref_hidden: Tensor | None  # [2B, T, D], for the task "reference" only
    ref_weight: Tensor | None  # [V, D], likewise

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are asked of."""
        return [self.hidden] if self.task == "frozen" else [self.hidden, self.weight]


# (inputs) -> the loss [], and in nats what it is of: sequences' log-probs [2B], or log ratios [2B] for "reference", or
# the sum of all tokens' [1] for "nll"
LossFromHidden = Callable[[Inputs], tuple[Tensor, Tensor]]
# (hidden [R, D], weight [V, D], targets [R]) -> log-probs [R]
TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]


def loss_of_token_logps(policy: Tensor, reference: Tensor | None, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The task's loss from log-probs [2B, T - 1] that are 0 where not scored; see `LossFromHidden`."""
    if inputs.task == "nll":
        total = policy.sum()
        return -total / (inputs.labels[:, 1:] != IGNORE_INDEX).sum(), total.detach().unsqueeze(0)
    logratios = (policy if reference is None else policy - reference).sum(-1)
    chosen, rejected = logratios.chunk(2)
    return -logsigmoid(BETA * (chosen - rejected)).mean(), logratios.detach()
