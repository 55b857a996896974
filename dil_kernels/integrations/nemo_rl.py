"""NeMo-RL: a loss for its DPO; the log-probs stay NeMo-RL's, in parallel over vocabulary and context.

In nemo_rl/algorithms/dpo.py, or in a copy of it, change two lines:

    from dil_kernels.integrations.nemo_rl import DILLossFn
    loss_fn = DILLossFn(master_config.dpo, ...)        # was: DPOLossFn(master_config.dpo, ...)

and write the options beside the others of `dpo` in the YAML file:

    dpo:
      preference_average_log_probs: true
      dil: {loss_type: lsif}

The loss is handed to workers, which import this module: dil-kernels must be installed in their environments, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nemo_rl.algorithms.loss.loss_functions import DPOLossFn
from torch import Tensor

from dil_kernels.integrations.hooks import Hook, HookOptions, check_trainer, refuse, say

__all__ = ["DILLossFn"]

PACKAGE = check_trainer(
    "nemo-rl",
    ("0.6.0", "0.7.0"),
    {DPOLossFn._dpo_loss: ("self", "next_token_logprobs", "data", "global_valid_seqs")},
)
UNUSED = {"average_log_prob": True, "fused_head": None, "stash_bytes": None, "padding_free": False}


class DILLossFn(DPOLossFn):
    """NeMo-RL's `DPOLossFn` with a density-ratio loss in the place of its preference loss.

    preference_loss_weight and the SFT term stay as they are; preference_average_log_probs says whether log ratios are
    averaged.

    Args:
        cfg: the block `dpo` of NeMo-RL's configuration, in which `dil` has the fields of `HookOptions`.
        rest: those of NeMo-RL's loss.

    Raises:
        ValueError: an option that would have no effect.
    """

    def __init__(self, cfg: Any, **rest: Any) -> None:
        super().__init__(cfg, **rest)
        given = cfg.get("dil") if isinstance(cfg, Mapping) else getattr(cfg, "dil", None)
        refuse(self, {"reference_policy_kl_penalty": 0.05}, "leave it 0.05, and see dil.beta")
        refuse(given or {}, UNUSED, "log-probs are NeMo-RL's, and preference_average_log_probs is its option")
        average = {"average_log_prob": bool(self.preference_average_log_probs)}
        self._hook = Hook(PACKAGE, HookOptions.of({**(given or {}), **average}, "dpo.dil"))
        say(f"dil_kernels in {PACKAGE}: loss {self._hook.options}, log-probs from NeMo-RL")

    def _dpo_loss(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, the accuracy and the rewards of the pairs 2i and 2i + 1, as shares of the global means."""
        scored = (data["token_mask"][:, 1:] > 0) & (data["sample_mask"] > 0).unsqueeze(1)
        ref_logprobs = data["reference_policy_logprobs"][:, :-1]
        sums = [torch.where(scored, logps.double(), 0.0).sum(1) for logps in (next_token_logprobs, ref_logprobs)]
        losses, counted, chosen_rewards, rejected_rewards = self._hook.pair_losses(
            *(side for values in (*sums, scored.sum(1)) for side in (values[::2], values[1::2]))
        )
        values = (losses, (chosen_rewards > rejected_rewards) & counted, chosen_rewards, rejected_rewards)
        loss, accuracy, chosen, rejected = (value.float().sum() / (global_valid_seqs / 2) for value in values)
        return loss, accuracy, chosen, rejected
