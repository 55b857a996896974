"""Batches without padding: the sequences of a batch one after another in one row; and what both forms share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dil_kernels import reference
from dil_kernels.data.tokenization import IGNORE_INDEX, pair_columns, responses_of


class PackedCollator:
    """Batches tokenised pairs as `PreferenceCollator` does, in one row without padding."""

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of B pairs: B chosen sequences, then the B rejected ones; N tokens together.

        Returns:
            input_ids, position_ids and labels [1, N] int64 (positions from 0 in each sequence; labels are -100 on
            prompts and on the first token of every sequence), cu_seqlens int32 [2B + 1], max_seqlen and num_scored;
            rows, reference log-probs and is_chosen as in `PreferenceCollator`.
        """
        sequences = responses_of(pairs)
        lengths = [len(prompt) + len(response) for prompt, response in sequences]
        boundaries = [0, *itertools.accumulate(lengths)]
        labels = torch.tensor([x for prompt, response in sequences for x in [IGNORE_INDEX] * len(prompt) + response])
        labels[[start for start in boundaries[:-1] if start < len(labels)]] = IGNORE_INDEX
        return {
            "input_ids": torch.tensor([[x for sequence in sequences for part in sequence for x in part]]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
            "labels": labels.unsqueeze(0),
            "cu_seqlens": torch.tensor(boundaries, dtype=torch.int32),
            "max_seqlen": max(lengths),
            "num_scored": int((labels != IGNORE_INDEX).sum()),
            **pair_columns(pairs),
        }


def packed_inputs(input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Any]:
    """What the forward of a model takes for a packed row.

    Args:
        input_ids: [1, N].
        position_ids: [1, N], from 0 in each sequence.
        cu_seqlens: int32 [S + 1], boundaries of the sequences.
        max_seqlen: tokens of the longest.
    """
    boundaries = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    lengths = {"max_length_q": max_seqlen, "max_length_k": max_seqlen}
    # The boundaries spare FlashAttention, in every layer, to find them and wait for the device.
    return {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, **boundaries, **lengths}


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the forward of a model takes of a batch, padded or packed."""
    if "cu_seqlens" in batch:
        return packed_inputs(*(batch[name] for name in ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")))
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}


def sequence_labels(batch: Mapping[str, Any]) -> Tensor:
    """Labels as the kernels take them: [S, T], or [N] of a packed batch."""
    labels: Tensor = batch["labels"]
    return labels.squeeze(0) if "cu_seqlens" in batch else labels


def sequence_sums(token_values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Sums [S] over the tokens of each sequence, of [S, T - 1] or packed [N - 1]; fp64 on the CPU."""
    values = token_values.to(reference.accumulation_dtype(token_values.device))
    return reference.sequence_sums(values, batch.get("cu_seqlens"), batch["labels"].shape[1])


def scored_counts(batch: Mapping[str, Any]) -> Tensor:
    """`DILOutput.counts` of a batch: its scored pairs, twice; unpaired, its scored chosen and rejected responses."""
    scored = has_scored_token(batch)
    if "is_chosen" not in batch:
        return torch.logical_and(*scored.chunk(2)).sum().expand(2)
    is_chosen = batch["is_chosen"]
    return torch.stack([(scored & is_chosen).sum(), (scored & ~is_chosen).sum()])


def has_scored_token(batch: Mapping[str, Any]) -> Tensor:
    """Whether each sequence has a scored token, [S] bool."""
    scored = sequence_labels(batch)[..., 1:] != IGNORE_INDEX
    return sequence_sums(scored, batch) > 0
