"""What a batch is asked: how its sequences lie in rows, their labels, their sides and what their rows brought along.

Collators make plain dicts, which travel through loaders and to devices; `Batch.of` alone looks at their keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dil_kernels import reference
from dil_kernels.data.token_columns import GIVEN_REFERENCE, REF_COLUMNS, UNPAIRED_REF_COLUMNS
from dil_kernels.functional.reference_logps import resolve_ref_logps
from dil_kernels.losses import FusedLossOptions

IGNORE_INDEX = -100


class Padded(NamedTuple):
    """Each sequence in a row of its own, padded on the right."""

    input_ids: Tensor  # [S, T]
    attention_mask: Tensor  # [S, T]

    @property
    def cu_seqlens(self) -> None:
        """Nothing has to say where a sequence ends."""

    def model_inputs(self) -> dict[str, Any]:
        """What the forward of a model takes."""
        return {**self._asdict(), "use_cache": False}


class Packed(NamedTuple):
    """The sequences one after another in one row of N tokens."""

    input_ids: Tensor  # [1, N]
    position_ids: Tensor  # [1, N], from 0 in each sequence
    cu_seqlens: Tensor  # int32 [S + 1], boundaries of the sequences
    max_seqlen: int  # tokens of the longest

    def model_inputs(self) -> dict[str, Any]:
        """What the forward of a model takes."""
        boundaries = {"cu_seq_lens_q": self.cu_seqlens, "cu_seq_lens_k": self.cu_seqlens}
        lengths = {"max_length_q": self.max_seqlen, "max_length_k": self.max_seqlen}
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}
        # The boundaries spare FlashAttention, in every layer, to find them and wait for the device.
        return {**inputs, **boundaries, **lengths}


@dataclass  # not a tuple: torch.compile would make a graph for the lengths of every batch
class Segments:
    """The stretches of tokens of a `SharedPrefixes` row; it stands for the attention mask of the row."""

    lengths: tuple[int, ...]
    prefixes: tuple[int | None, ...]  # the place of the stretch, before it, that each goes on from; None for none


class SharedPrefixes(NamedTuple):
    """Each prompt once, for all responses to it, in one row of N tokens.

    The row holds the prompts without their last tokens, the prefixes, and then S segments: the last token of a prompt
    and a response. So every scored token has a hidden state of its own, and the shift of labels stays in a segment.
    """

    input_ids: Tensor  #: [1, N]
    position_ids: Tensor  #: [1, N], those of the sequence that a token is in
    cu_seqlens: Tensor  #: int32 [S + 1], of the segments; the first one has the prefixes, too, which have no labels
    stretch_lengths: list[int]  #: as in `Segments`, of the prefixes, then of the segments; none is 0
    stretch_prefixes: list[int | None]

    def to(self, device: torch.device | str) -> SharedPrefixes:
        """The row on a device, that of the model."""
        ids, positions, boundaries = (x.to(device) for x in (self.input_ids, self.position_ids, self.cu_seqlens))
        return self._replace(input_ids=ids, position_ids=positions, cu_seqlens=boundaries)

    def model_inputs(self) -> dict[str, Any]:
        """What the forward of a model takes that `install_prefix_sharing` has prepared; others fail on the mask."""
        segments = Segments(tuple(self.stretch_lengths), tuple(self.stretch_prefixes))
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}
        return {**inputs, "attention_mask": segments}


@dataclass(frozen=True)
class Batch:
    """S sequences: the chosen ones of B pairs, then the rejected ones; or unpaired responses in any order.

    Attributes:
        layout: of the rows.
        row_labels: as the rows lie, [S, T] or [1, N]; IGNORE_INDEX where nothing is scored.
        num_scored: how many positions are scored; None if the device would have to be asked.
        rows: [B] or [S], the place of each pair or response in its data set, from 1; None if unknown.
        is_chosen: [S] bool of unpaired responses; None for pairs.
        given_ref_logps: by column, log-probs [B] or [S] of the reference that the rows brought.
    """

    layout: Padded | Packed | SharedPrefixes
    row_labels: Tensor
    num_scored: int | None
    rows: Tensor | None
    is_chosen: Tensor | None
    given_ref_logps: dict[str, Tensor]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Batch:
        """The batch that a collator of collators.py made."""
        joined = SharedPrefixes if "stretch_prefixes" in inputs else Packed
        layout: Any = joined if "cu_seqlens" in inputs else Padded
        return cls(
            layout=layout(*(inputs[name] for name in layout._fields)),
            row_labels=inputs["labels"],
            num_scored=inputs.get("num_scored"),
            rows=inputs.get("rows"),
            is_chosen=inputs.get("is_chosen"),
            given_ref_logps={name: inputs[name] for name in GIVEN_REFERENCE if name in inputs},
        )

    @property
    def labels(self) -> Tensor:
        """As the kernels take them: [S, T], or [N] of one row."""
        return self.of_rows(self.row_labels)

    def of_rows(self, values: Tensor) -> Tensor:
        """Labels or log-probs as the rows have them, [S, T] or [1, N], as the kernels take them."""
        return values if self.layout.cu_seqlens is None else values.squeeze(0)

    def sums(self, token_values: Tensor) -> Tensor:
        """Sums [S] over the tokens of each sequence, of [S, T - 1] or packed [N - 1]; fp64 on the CPU."""
        values = token_values.to(reference.accumulation_dtype(token_values.device))
        return reference.sequence_sums(values, self.layout.cu_seqlens, self.labels.shape[-1])

    def has_scored_token(self) -> Tensor:
        """Of each sequence, [S] bool."""
        return self.sums(self.labels[..., 1:] != IGNORE_INDEX) > 0

    def scored_counts(self) -> Tensor:
        """`DILOutput.counts`: the scored pairs, twice; unpaired, the scored chosen and rejected responses."""
        scored = self.has_scored_token()
        if self.is_chosen is None:
            return torch.logical_and(*scored.chunk(2)).sum().expand(2)
        return torch.stack([(scored & self.is_chosen).sum(), (scored & ~self.is_chosen).sum()])

    def ref_logps(self, options: FusedLossOptions) -> Tensor | None:
        """The log-probs [S] of the reference that the rows brought, checked.

        Args:
            options: of the loss.
        """
        columns = REF_COLUMNS if self.is_chosen is None else UNPAIRED_REF_COLUMNS
        given = {name: self.given_ref_logps[name] for name in columns}
        cu_seqlens = self.layout.cu_seqlens
        return resolve_ref_logps(self.labels, cu_seqlens, options, name="labels", is_chosen=self.is_chosen, **given)
