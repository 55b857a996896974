"""`dil_loss` in trainers that have their own loop: four [B] tensors of log-probs in, losses and rewards out.

Each function below takes the place of one function of one project, with its signature; its docstring says which, in
which version, and how to put it there. These trainers hand over sums of log-probs unless told otherwise. LSIF and
UKL need them divided by the lengths; bce and dpo can do without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dil_kernels import dil_loss


def openrlhf_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """OpenRLHF 0.11: `trainer.loss_fn` of `openrlhf.trainer.dpo_trainer.DPOTrainer`, made by `openrlhf.cli.train_dpo`.

    For the lengths, also set `openrlhf_batch_logps` as the class's `_get_batch_logps`.
    """
    return dil_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        loss_type="lsif",
        reduction="mean",
    )


def openrlhf_batch_logps(
    self: Any, per_token_logps: Tensor, attention_mask: Tensor, prompt_id_lens: list[int]
) -> tuple[Tensor, Tensor]:
    """OpenRLHF 0.11: `DPOTrainer._get_batch_logps`, with the mean log-prob of each response where the sum was."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    responses = positions >= torch.as_tensor(prompt_id_lens, device=attention_mask.device).unsqueeze(1)
    mask = (attention_mask.bool() & responses)[:, 1:]
    means = (per_token_logps * mask).sum(-1) / mask.sum(-1)
    return means, means


def llamafactory_dpo_loss(
    self: Any,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *unused: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """LLaMA-Factory 0.9.5: `llamafactory.train.dpo.trainer.CustomDPOTrainer.dpo_loss`; also that of TRL 0.24 to 0.28.

    With `pref_loss: ipo` LLaMA-Factory, with `loss_type="ipo"` TRL divides the log-probs of both models by the lengths
    before. TRL hands on its loss_type and model_output, too.
    """
    return dil_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, loss_type="lsif")


def swift_dpo_loss(
    self: Any,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    loss_type: str,
    model_output: dict[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """ms-swift 4.6.0: `swift.rlhf_trainers.DPOTrainer.dpo_loss`, set in a file that `--external_plugins` names."""
    chosen_lengths = model_output["chosen_completion_token_counts"]
    rejected_lengths = model_output["rejected_completion_token_counts"]
    return dil_loss(
        chosen_logps / chosen_lengths,
        rejected_logps / rejected_lengths,
        ref_chosen_logps / chosen_lengths,
        ref_rejected_logps / rejected_lengths,
        loss_type="lsif",
    )


def nemo_preference_loss(
    self: Any, rewards: Tensor, sample_mask: Tensor, global_valid_seqs: Tensor, beta: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NeMo-RL 0.6: `nemo_rl.algorithms.loss.loss_functions.DPOLossFn._preference_loss`.

    The rewards are log ratios already, chosen and rejected interleaved; `preference_average_log_probs: true` in the
    configuration divides them by the lengths. beta is that of DPO and has no part here.
    """
    chosen, rejected = rewards[0::2], rewards[1::2]
    zeros = torch.zeros_like(chosen)
    losses, chosen_rewards, rejected_rewards = dil_loss(chosen, rejected, zeros, zeros, loss_type="lsif")
    values = (losses, chosen_rewards > rejected_rewards, chosen_rewards, rejected_rewards)
    mask, num_pairs = sample_mask[0::2], global_valid_seqs / 2
    loss, accuracy, chosen_mean, rejected_mean = ((value * mask).sum() / num_pairs for value in values)
    return loss, accuracy, chosen_mean, rejected_mean
