"""The two-stage route (DIL, arXiv 2503.05079, eqs. 17, 21): fit log r with a reward head, then train a policy on it.

A sequence-classification model with one output gives ``log r(x, y)``; `train_reward` fits it with any divergence to
chosen and rejected responses, and `DensityRatioReward` hands it to whatever optimises a policy online: it is a reward
function as TRL's trainers call it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dil_kernels.functional import dil_loss, unpaired_dil_loss
from dil_kernels.wording import needs_extra

try:
    import datasets
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
except ImportError as error:
    raise ImportError(needs_extra("dil_kernels.models.reward", "train", error)) from error

from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.data.token_columns import is_tokenised
from dil_kernels.data.tokenization import PairTokenizer, tokenize_dataset
from dil_kernels.models.evaluation import evaluating
from dil_kernels.models.reward_head import install_end_of_row, scores_at_end
from dil_kernels.models.rotary_lengths import keep_lengths_apart

__all__ = ["DensityRatioReward", "RewardTrainer", "density_ratio_reward_loss", "train_reward"]

Conversation = str | list[dict[str, str]]


def density_ratio_reward_loss(
    scores: Tensor, is_chosen: Tensor | None = None, *, loss_type: str = "lsif", reduction: str = "mean", **options: Any
) -> Tensor:
    """Fit of ``log r`` by the outputs of a reward model (eq. 21): the loss of `dil_loss` with the output as log ratio.

    Where the rejected responses are samples of the reference, the minimum is at ``r = pi_chosen / pi_ref`` for every
    separable Bregman divergence.

    Args:
        scores: [2B] fp32 or fp64, of B chosen responses, then of the B rejected (or sampled) ones; [S] with
            `is_chosen`.
        is_chosen: [S] bool of responses that do not come in pairs.
        loss_type, reduction, options: as in `dil_loss` or `unpaired_dil_loss`; dpo fits differences of rewards only.

    Raises:
        ValueError, TypeError: a shape or an option that does not fit.
    """
    if options.get("nll_weight"):
        raise ValueError(
            f"nll_weight={options['nll_weight']} was given, but a reward model has no likelihood; leave it 0"
        )
    zeros = torch.zeros_like(scores)
    options |= {"loss_type": loss_type, "reduction": reduction}
    if is_chosen is not None:
        return unpaired_dil_loss(scores, zeros, is_chosen, **options)[0]
    if scores.ndim != 1 or scores.shape[0] % 2:
        raise ValueError(f"scores must be [2B], chosen then rejected, got {list(scores.shape)}")
    return dil_loss(*scores.chunk(2), *zeros.chunk(2), **options)[0]


class RewardTrainer(Trainer):
    """`transformers.Trainer` of a sequence-classification model with one output on pairs or unpaired responses.

    Args:
        loss_options: of `density_ratio_reward_loss`.
        args, kwargs: of `transformers.Trainer`; the data are tokenised ones, in batches of `PreferenceCollator`.
    """

    def __init__(self, *args: Any, loss_options: Mapping[str, Any], **kwargs: Any) -> None:
        self._loss_options = dict(loss_options)
        super().__init__(*args, **kwargs)
        model: Any = self.model
        install_end_of_row(model)
        keep_lengths_apart(model)
        self._config = model.config  # wrappers do not have it
        # Each micro-batch is a mean of its own, which the Trainer averages.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The fit of log r on one batch."""
        scores, outputs = scores_at_end(model, self._config, inputs["input_ids"], inputs["attention_mask"])
        loss = density_ratio_reward_loss(scores, inputs.get("is_chosen"), **self._loss_options)
        return (loss, outputs) if return_outputs else loss


def train_reward(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    args: TrainingArguments,
    *,
    max_length: int | None = 1024,
    **loss_options: Any,
) -> DensityRatioReward:
    """Fit ``log r`` on a reward head and return it as a reward function.

    Args:
        model: of transformers' AutoModelForSequenceClassification with num_labels=1; trained in place.
        tokenizer: of the model, with a padding token.
        dataset: pairs or labelled responses in any form that `dil_kernels.data.load_preference_pairs` accepts.
        args: of the Trainer. Batches are whole pairs; a step's loss is the mean over its micro-batches, so prefer a
            larger batch to accumulation where sides are unpaired or a correction couples the batch.
        max_length: tokens of a sequence beyond which it is truncated, in training and as a reward.
        loss_options: of `density_ratio_reward_loss`.

    Raises:
        ValueError: a model without one output, a tokenizer without a padding token, or an option that does not fit.
        PreferenceDataError: a broken record.
    """
    reward = DensityRatioReward(model, tokenizer, max_length=max_length)
    pad: Any = tokenizer.pad_token_id
    if not is_tokenised(dataset.column_names):
        dataset = tokenize_dataset(dataset, tokenizer, **_lengths(max_length))
    args.remove_unused_columns = False
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=PreferenceCollator(pad),
        loss_options=loss_options,
    )
    trainer.train()
    return reward


class DensityRatioReward:
    """``log r(x, y)`` of a fitted model as a reward function: ``(prompts, completions, **kwargs) -> list[float]``.

    Eq. 17 maximises it under a KL penalty to the reference of weight beta = 1. The score is that of the last token of a
    response, its EOS, also where the padding token is EOS.

    Args:
        model: a sequence-classification model with one output.
        tokenizer: of the model, with a padding token; conversations need its chat template.
        max_length: tokens beyond which a sequence is truncated as in `train_reward`; None for no limit.
        batch_size: sequences scored at once.

    Raises:
        ValueError: a model without one output, a tokenizer without a padding token, or a max_length below 2.
        NotImplementedError: a model whose scores would depend on what else is in a batch.
    """

    __name__ = "density_ratio_reward"  # under which TRL logs it

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = 1024,
        batch_size: int = 32,
    ) -> None:
        config: Any = model.config
        if config.num_labels != 1:
            raise ValueError(f"model must have one output (num_labels=1), got {config.num_labels}")
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer must have a padding token, as a batch is of sequences of any length")
        _lengths(max_length)  # refuses what leaves no room
        if config.get_text_config().pad_token_id is None:  # transformers takes no batches without
            config.get_text_config().pad_token_id = tokenizer.pad_token_id
        install_end_of_row(model)
        keep_lengths_apart(model)
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size = max_length, batch_size

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Conversation], completions: Sequence[Conversation], **kwargs: Any
    ) -> list[float]:
        """``log r`` of each completion.

        Args:
            prompts: [N] strings, or lists of messages.
            completions: [N] likewise.
            kwargs: other columns, which TRL passes; not used.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"completions must be {len(prompts)} as prompts, got {len(completions)}")
        to_ids, lengths = PairTokenizer(self.tokenizer), _lengths(self.max_length)
        sequences = []  # with the token ids that such a response has in `train_reward`
        for prompt, completion in zip(prompts, completions, strict=True):
            ids = to_ids({"prompt": prompt, "completion": completion}, "reward")
            sequences.append(list(itertools.chain.from_iterable(to_ids.truncated(ids, **lengths))))
        config: Any = self.model.config
        device = next(self.model.parameters()).device
        collator = PreferenceCollator(self.tokenizer.pad_token_id)
        scores: list[float] = []
        with evaluating(self.model):
            for start in range(0, len(sequences), self.batch_size):
                rows = sequences[start : start + self.batch_size]
                batch = collator([{"prompt_ids": [], "completion_ids": ids, "label": True} for ids in rows])
                inputs = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
                scores += scores_at_end(self.model, config, *inputs)[0].tolist()
        return scores


def _lengths(max_length: int | None) -> dict[str, Any]:
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, one token for prompt and response each, got {max_length}")
    half = None if max_length is None else max_length // 2
    return {"max_length": max_length, "max_prompt_length": half, "truncation_mode": "keep_end"}
