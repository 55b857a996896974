"""Collators: tokenised pairs and unpaired responses to batches, padded or in one row, with each prompt once or not."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dil_kernels.data.batches import IGNORE_INDEX, Packed, SharedPrefixes
from dil_kernels.data.token_columns import GIVEN_REFERENCE, TOKEN_COLUMNS, UNPAIRED_TOKEN_COLUMNS, is_unpaired

Sequences = Sequence[tuple[Sequence[int] | Tensor, Sequence[int] | Tensor]]  # prompt and response of each


@dataclass(frozen=True)
class PreferenceCollator:
    """Batches tokenised pairs: B chosen sequences, then the B rejected ones, padded on the right.

    Unpaired responses come in their order, with their sides.

    Attributes:
        pad_token_id: fills the input ids; attention mask and labels keep it out of everything.
        pad_to_multiple_of: T is a multiple of this.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of B pairs.

        Returns:
            input_ids, attention_mask and labels [2B, T] int64 (labels are -100 on prompt and padding); num_scored, how
            many positions are scored, which the device would have to be asked for. Where the pairs have them: rows [B]
            int64, the place of each pair in its data set; ref_chosen_logps and ref_rejected_logps [B] fp32. For S
            unpaired responses: [S, T], is_chosen [S] bool, rows [S] and ref_logps [S].

        Raises:
            TypeError: a token id is no integer.
        """
        sides = _as_integers(_responses_of(pairs))
        longest = max(2, *(len(prompt) + len(response) for prompt, response in sides))  # one position predicts nothing
        shape = (len(sides), longest + -longest % self.pad_to_multiple_of)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX)
        for index, (prompt, response) in enumerate(sides):
            end = len(prompt) + len(response)
            input_ids[index, :end] = torch.tensor([*prompt, *response])
            attention_mask[index, :end] = 1
            labels[index, len(prompt) : end] = input_ids[index, len(prompt) : end]
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        batch["num_scored"] = int((labels[:, 1:] != IGNORE_INDEX).sum())
        return {**batch, **_pair_columns(pairs)}


class PackedCollator:
    """Batches tokenised pairs as `PreferenceCollator` does, in one row without padding."""

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of B pairs: B chosen sequences, then the B rejected ones; N tokens together.

        Returns:
            input_ids, position_ids and labels [1, N] int64 (positions from 0 in each sequence; labels are -100 on
            prompts and on the first token of every sequence), cu_seqlens int32 [2B + 1], max_seqlen and num_scored;
            rows, reference log-probs and is_chosen as in `PreferenceCollator`.
        """
        row, labels = pack_sequences(_two_positions(_responses_of(pairs)))
        return {**row_batch(row, labels), **_pair_columns(pairs)}


class SharedPrefixCollator:
    """Batches tokenised pairs as `PackedCollator` does, with prompts of the same token ids once."""

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of B pairs: the prompts, then B chosen responses, then the B rejected ones; N tokens together.

        Returns:
            The fields of `SharedPrefixes`, labels [1, N] and num_scored; rows, reference log-probs and is_chosen as in
            `PreferenceCollator`.
        """
        row, labels = share_prefixes(_two_positions(_responses_of(pairs)))
        return {**row_batch(row, labels), **_pair_columns(pairs)}


def row_batch(row: Packed | SharedPrefixes, labels: Tensor) -> dict[str, Any]:
    """A row and its labels [1, N] as a batch, with num_scored."""
    return {**row._asdict(), "labels": labels, "num_scored": int((labels != IGNORE_INDEX).sum())}


def pack_sequences(sequences: Sequences) -> tuple[Packed, Tensor]:
    """Put sequences one after another into one row.

    Args:
        sequences: token ids of the prompt and of the response of each of S sequences, lists or tensors [n].

    Returns:
        The row of N tokens, and its labels [1, N]: -100 but on the tokens of responses that do not begin a sequence.

    Raises:
        TypeError: a token id is no integer.
    """
    sequences = _as_integers(sequences)
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    boundaries = [0, *itertools.accumulate(lengths)]
    labels = torch.tensor([x for prompt, response in sequences for x in (*[IGNORE_INDEX] * len(prompt), *response)])
    labels[[start for start in boundaries[:-1] if start < len(labels)]] = IGNORE_INDEX
    row = Packed(
        input_ids=torch.tensor([[x for sequence in sequences for part in sequence for x in part]]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        max_seqlen=max(lengths),
    )
    return row, labels.unsqueeze(0)


def share_prefixes(sequences: Sequences) -> tuple[SharedPrefixes, Tensor]:
    """Put sequences into one row in which each prompt stands once, for all responses to it.

    A model needs `dil_kernels.models.prefix_sharing.install_prefix_sharing` for such a row. The kernels take its
    `cu_seqlens`, and see the sequences in their order.

    Args:
        sequences: token ids of the prompt and of the response of each of S sequences, lists or tensors [n]. Prompts are
            the same if all of their token ids are.

    Returns:
        The row of N tokens, and its labels [1, N]: -100 but on the tokens of responses.

    Raises:
        TypeError: a token id is no integer.
    """
    sequences = _as_integers(sequences)
    places: dict[tuple[int, ...], int] = {}  # of the prefixes, by prompt
    for prompt, _ in sequences:
        if len(prompt) > 1:
            places.setdefault(prompt, len(places))
    prefixes = [prompt[:-1] for prompt in places]
    segments = [(*prompt[-1:], *response) for prompt, response in sequences]
    parts: list[tuple[int, int | None, Sequence[int]]] = [(0, None, prefix) for prefix in prefixes]
    parts += [
        (max(len(prompt) - 1, 0), places.get(prompt), segment)
        for (prompt, _), segment in zip(sequences, segments, strict=True)
    ]
    num_unscored = sum(map(len, prefixes))
    ends = [*itertools.accumulate(map(len, segments), initial=num_unscored)][1:]
    labels = [x for segment in segments for x in (IGNORE_INDEX, *segment[1:])[: len(segment)]]
    positions = [start + index for start, _, part in parts for index in range(len(part))]
    row = SharedPrefixes(
        input_ids=torch.tensor([[x for *_, part in parts for x in part]], dtype=torch.int64),
        position_ids=torch.tensor([positions], dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        stretch_lengths=[len(part) for *_, part in parts if part],
        stretch_prefixes=[place for _, place, part in parts if part],
    )
    return row, torch.tensor([[IGNORE_INDEX] * num_unscored + labels], dtype=torch.int64)


def _as_integers(sequences: Sequences) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token ids as Python's integers, by which prompts are told apart; entries of tensors are equal to nothing."""

    def integers(ids: Any) -> tuple[int, ...]:
        return tuple(map(operator.index, ids.tolist() if hasattr(ids, "tolist") else ids))

    try:
        return [(integers(prompt), integers(response)) for prompt, response in sequences]
    except TypeError as error:
        raise TypeError(f"sequences must be pairs of token ids, integers each: {error}") from error


def _two_positions(sequences: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Sequences for one row: where they have fewer than two tokens together the first, unscored, is filled."""
    missing = 2 - sum(len(prompt) + len(response) for prompt, response in sequences)
    if missing <= 0:
        return sequences
    (prompt, response), *others = sequences
    return [([*prompt, *response, *[0] * missing], []), *others]


def _responses_of(pairs: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each sequence of a batch: the chosen ones, then the rejected; unpaired, in their order."""
    columns = UNPAIRED_TOKEN_COLUMNS[1:2] if is_unpaired(pairs[0]) else TOKEN_COLUMNS[1:]
    return [(pair["prompt_ids"], pair[column]) for column in columns for pair in pairs]


def _pair_columns(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What a batch says of its pairs, where they have it: rows, is_chosen, and the log-probs of the reference."""
    columns = {}
    if "row" in pairs[0]:
        columns["rows"] = torch.tensor([pair["row"] for pair in pairs])
    if is_unpaired(pairs[0]):
        columns["is_chosen"] = torch.tensor([pair["label"] for pair in pairs])
    for column in GIVEN_REFERENCE:
        if any(column in pair for pair in pairs):
            columns[column] = torch.tensor([pair[column] for pair in pairs], dtype=torch.float32)
    return columns
