"""What the adapters to other trainers share: their options, the log-probs of responses, and the loss.

The trainer keeps its data, its optimizer, its metrics and how it averages over micro-batches and processes. An adapter
takes the place of two of its functions: the forward over a batch of pairs, and the loss of their log-probs.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dil_kernels.data.batches import IGNORE_INDEX, Packed
from dil_kernels.functional import dil_loss
from dil_kernels.losses import FusedLossOptions
from dil_kernels.models.fused_head import install_fused_heads
from dil_kernels.models.packed_attention import install_packed_attention
from dil_kernels.models.rotary_lengths import keep_lengths_apart
from dil_kernels.models.scoring import score
from dil_kernels.reference import sequence_sums
from dil_kernels.training.loss_fields import FusedLossFields

__all__ = ["Hook", "HookOptions", "Responses"]

logger = logging.getLogger(__name__)

PLACED = {"input_ids", "attention_mask", "position_ids"}  # what a row without padding can be made of


@dataclass
class HookOptions(FusedLossFields):
    """What a person chooses in an adapter; checked at construction.

    Raises:
        ValueError, TypeError: an option that is out of range, of another type, or not used by the loss.
    """

    padding_free: bool = field(
        default=False,
        metadata={"help": "Put the sequences of a padded batch one after another in one row before the forward."},
    )

    def __post_init__(self) -> None:
        self.check_fields("padding_free")
        FusedLossOptions(**self.loss_options(), average_log_prob=self.average_log_prob)

    @classmethod
    def of(cls, values: Mapping[str, Any] | None, place: str) -> HookOptions:
        """The options that stand in a trainer's configuration.

        Args:
            values: by name; None for none.
            place: where they stand, for the error.

        Raises:
            ValueError: a name that is unknown.
        """
        if values is not None and not isinstance(values, Mapping):
            raise ValueError(f"{place} must map the names of options to their values, got {values!r}")
        names = [option.name for option in dataclasses.fields(cls)]
        for name in values or {}:
            if name not in names:
                raise ValueError(f"unknown option {name!r} in {place}; available: {', '.join(names)}")
        return cls(**(values or {}))

    def __str__(self) -> str:
        """The loss with what is not at its default, and what it is taken of."""
        given = [
            f"{option.name}={getattr(self, option.name)}"
            for option in dataclasses.fields(FusedLossFields)
            if option.name not in ("loss_type", "average_log_prob", "fused_head")
            and getattr(self, option.name) != option.default
        ]
        options = f" ({', '.join(given)})" if given else ""
        return (
            f"{self.loss_type}{options} of log ratios {'averaged' if self.average_log_prob else 'summed'} over tokens"
        )


class Responses(NamedTuple):
    """What a model has to say of S responses, from a batch of S sequences."""

    logps: Tensor  #: [S] fp64, summed over the scored tokens
    lengths: Tensor  #: [S] int64, scored tokens
    mean_logits: Tensor | None  #: [S] fp64, over vocabulary and scored tokens, detached; 0 without a token
    outputs: Any  #: of the model


class Hook:
    """The density-ratio loss and the fused head in the place of a trainer's own.

    Args:
        trainer: its name and version, for what is said.
        options: of the loss, and of how log-probs are computed.
    """

    def __init__(self, trainer: str, options: HookOptions) -> None:
        self.trainer, self.options = trainer, options
        self.fused_head = False

    @property
    def factor(self) -> float:
        """What rewards multiply log ratios by: beta."""
        return FusedLossOptions(**self.options.loss_options()).factor

    def install(self, *models: nn.Module | None) -> None:
        """Give the models the fused head, if all of them can have it, and say in one line what is trained.

        Args:
            models: policy and reference, before they are wrapped; None for one that does not exist.

        Raises:
            UnsupportedHeadError: fused_head=True was given, but a model cannot have it.
            UnsupportedPackingError: padding_free=True was given, but a model cannot do without padding.
            NotImplementedError: prompt tuning, whose tokens have no labels; or rotary embeddings that go by the longest
                sequence of a batch and cannot be made to do otherwise, or not before the model has its weights.
        """
        found = [model for model in models if model is not None]
        for model in found:
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise NotImplementedError("prompt tuning adds virtual tokens, which have no label; use LoRA")
            # Processes that get their weights later cannot try it.
            if not any(buffer.is_meta for buffer in model.buffers()) or _goes_by_lengths(model):
                keep_lengths_apart(model)
        if self.options.padding_free:
            install_packed_attention(*found)
        problem = install_fused_heads(found, self.options.fused_head)
        self.fused_head = problem is None
        rows = ", without padding" if self.options.padding_free else ""
        head = "the fused head" if problem is None else f"logits, since {problem}"
        say(f"dil_kernels in {self.trainer}: loss {self.options}, log-probs from {head}{rows}")

    def score(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        return_mean_logits: bool = False,
    ) -> Responses:
        """Score the responses of a batch; the model is called as it is wrapped.

        Args:
            model: policy or reference.
            inputs: of its forward.
            labels: [S, T], or [1, N] of one row; -100 where nothing is scored. Position t scores label t + 1.
            cu_seqlens: [S + 1], the boundaries of the sequences of one row; None for rows of one sequence.
            return_mean_logits: what some trainers log.
        """
        if self.options.padding_free and cu_seqlens is None:
            inputs, labels, cu_seqlens = without_padding(inputs, labels)
        scores = score(
            model,
            {**inputs, "use_cache": False},
            labels,
            fused_head=self.fused_head,
            backend=self.options.backend,
            stash_bytes=self.options.stash_bytes,
            max_scored_tokens=None,
            return_statistics=return_mean_logits,
        )

        def sums(values: Tensor) -> Tensor:  # in fp64, so that no difference of two sums is rounded
            rows = values.double() if cu_seqlens is None else values.double().squeeze(0)
            return sequence_sums(rows, cu_seqlens, labels.shape[1])

        lengths = sums(labels[:, 1:] != IGNORE_INDEX).long()
        mean_logits = None
        if scores.statistics is not None:
            mean_logits = sums(scores.statistics.mean_logit.detach()) / lengths.clamp(min=1)
        return Responses(sums(scores.token_logps), lengths, mean_logits, scores.outputs)

    def losses(self, *logps_and_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`pair_losses`, scaled so that their mean is that over the pairs that count."""
        losses, counted, *rewards = self.pair_losses(*logps_and_lengths)
        return losses * (counted.numel() / counted.sum().clamp(min=1)), *rewards  # type: ignore[return-value]

    def pair_losses(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        chosen_lengths: Tensor,
        rejected_lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss of each pair, from sums of log-probs and numbers of scored tokens, [B] each.

        Returns:
            losses [B] fp32. Whether a pair counts [B]: both of its responses have a scored token. The others have loss
            0, and no gradient. The chosen and rejected rewards [B]: beta times the log ratios, detached.

        Raises:
            ValueError: one of them has another shape than [B], as where a batch has no two responses a pair.
        """
        shapes = [list(each.shape) for each in (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)]
        shapes += [list(each.shape) for each in (chosen_lengths, rejected_lengths)]
        if chosen_logps.ndim != 1 or shapes[1:] != shapes[:-1]:
            raise ValueError(
                f"log-probs and lengths must be [B] of chosen and of rejected responses alike, got {shapes}"
            )
        lengths = (chosen_lengths, rejected_lengths)
        counted = (lengths[0] > 0) & (lengths[1] > 0)

        def of_responses(logps: Tensor, length: Tensor) -> Tensor:
            scale = length.clamp(min=1) if self.options.average_log_prob else 1
            return torch.where(counted, logps.double() / scale, 0.0)

        policy = [of_responses(*side) for side in zip((chosen_logps, rejected_logps), lengths, strict=True)]
        ref = [of_responses(*side) for side in zip((ref_chosen_logps, ref_rejected_logps), lengths, strict=True)]
        backend = "eager" if self.options.backend == "eager" else "auto"
        options = self.options.loss_options() | {"nll_weight": 0.0}  # which is of means over tokens in any case
        losses, chosen_rewards, rejected_rewards = dil_loss(*policy, *ref, backend=backend, **options)
        if self.options.nll_weight:
            losses = losses - self.options.nll_weight * chosen_logps / chosen_lengths.clamp(min=1)
        losses = torch.where(counted, losses, 0.0).float()
        return losses, counted, self.factor * chosen_rewards, self.factor * rejected_rewards


def _goes_by_lengths(model: Any) -> bool:
    """Whether the configuration of a model names rotary embeddings that go by the longest sequence."""
    config = model.config.get_text_config()
    rope = f"{getattr(config, 'rope_parameters', None)} {getattr(config, 'rope_scaling', None)}"
    return "longrope" in rope or "dynamic" in rope


def without_padding(inputs: Mapping[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The sequences of a padded batch in one row: what a model takes of it, its labels [1, N] and boundaries [S + 1].

    Args:
        inputs: input_ids and attention_mask [S, T]; positions count anew.
        labels: [S, T].

    Raises:
        NotImplementedError: the batch has images, or anything else that would have to be placed.
        ValueError: attention_mask is not [S, T], or not there.
    """
    others = {name: value for name, value in inputs.items() if name not in PLACED}
    if placed := [name for name, value in others.items() if isinstance(value, Tensor)]:
        raise NotImplementedError(f"padding_free=True takes batches of text only, but this one has {', '.join(placed)}")
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != labels.shape:
        found = "none" if mask is None else list(mask.shape)
        raise ValueError(f"padding_free=True needs an attention_mask {list(labels.shape)} as the labels, got {found}")
    kept = mask.bool()
    lengths = kept.sum(1)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    positions = (kept.long().cumsum(1) - 1)[kept]
    row = Packed(inputs["input_ids"][kept][None], positions[None], cu_seqlens, int(lengths.max()))
    # The first token of a sequence would be scored by the sequence before it.
    return {**others, **row.model_inputs()}, labels[kept].masked_fill(positions == 0, IGNORE_INDEX)[None], cu_seqlens


def check_trainer(package: str, known: tuple[str, ...], hooks: Mapping[Callable[..., Any], tuple[str, ...]]) -> str:
    """Check that a trainer calls its functions as the adapter to it knows.

    Args:
        package: its name on PyPI.
        known: the versions that the adapter was written for; another one is warned of.
        hooks: the parameters of each of its functions that are replaced or called.

    Returns:
        Its name and version.

    Raises:
        ImportError: a function has other parameters.
    """
    name = f"{package} {importlib.metadata.version(package)}"
    versions = " and ".join(known)
    for function, parameters in hooks.items():
        found = tuple(inspect.signature(function).parameters)
        if found != parameters:
            raise ImportError(
                f"{name} has {function.__qualname__}({', '.join(found)}), but this adapter knows that of {versions}: "
                f"({', '.join(parameters)}). Install one of these"
            )
    if name.split()[-1] not in known:
        logger.warning("%s is not among the versions that this adapter knows: %s", name, versions)
    return name


def refuse(values: Any, unused: Mapping[str, Any], instead: str) -> None:
    """Refuse options of a trainer that would have no effect.

    Args:
        values: of all options, by name, or the object whose attributes they are; one that is not there is not given.
        unused: their names, each with the value at which it is not given.
        instead: what to do.

    Raises:
        ValueError: one of them has another value.
    """
    given = values if isinstance(values, Mapping) else vars(values)
    for name, default in unused.items():
        value = given.get(name, default)
        value = value.value if isinstance(value, enum.Enum) else value
        if value != default:
            raise ValueError(f"{name}={value!r} was given, but the loss of dil_kernels does not use it; {instead}")


def say(line: str) -> None:
    """Print a line, in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
