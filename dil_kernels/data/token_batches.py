"""Batches that are filled by tokens: which rows each holds, in every epoch and on every process.

Memory goes by the tokens of a batch, and rows without padding differ much in theirs. All processes make the same
batches from the same seed, and each takes its share of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from dil_kernels.data.token_columns import COLLATED_COLUMNS, TOKEN_COLUMNS, UNPAIRED_TOKEN_COLUMNS
from dil_kernels.data.token_counts import prompt_numbers, response_id_columns, token_counts

# Batches that take rows at a time. With 300 real pairs of 191 to 3,892 tokens, batches of 4,096 are filled to 96%; with
# one at a time to 75%, with 64 to 97%.
OPEN_BATCHES = 16
FILLER = -1  # in place of a row, in a batch that has none


@dataclass(frozen=True)
class RowTokens:
    """What every row of a data set adds to the tokens of a batch.

    Attributes:
        prompts: [rows], which prompt each has; rows of the same one stay together.
        of_prompt: [rows], tokens that all rows of the same prompt in a batch add once.
        own: [rows], tokens beside these.
        names: [rows], of the rows for errors.
    """

    prompts: NDArray[np.int64]
    of_prompt: NDArray[np.int64]
    own: NDArray[np.int64]
    names: Sequence[int]

    @classmethod
    def of(cls, dataset: datasets.Dataset, *, shared: bool) -> RowTokens:
        """Those of a tokenised data set.

        Args:
            dataset: with token ids.
            shared: prompts are in a batch once, as `SharedPrefixCollator` has them; else as `PackedCollator` has them.
        """
        responses = [token_counts(dataset, name) for name in response_id_columns(dataset)]
        prompts, own = token_counts(dataset, "prompt_ids"), np.sum(responses, axis=0)
        names = dataset["row"][:] if "row" in dataset.column_names else range(1, len(dataset) + 1)
        if not shared:
            return cls(np.arange(len(own)), np.zeros_like(own), own + len(responses) * prompts, names)
        own = own + len(responses) * np.minimum(prompts, 1)
        return cls(prompt_numbers(dataset), np.maximum(prompts - 1, 0), own, names)

    def refuse_longer_than(self, max_tokens: int, name: str) -> None:
        """Refuse rows that no batch has room for.

        Args:
            max_tokens: of a batch.
            name: of the data set.

        Raises:
            ValueError: names the longest row.
        """
        tokens = self.of_prompt + self.own
        too_long = int((tokens > max_tokens).sum())
        if too_long:
            longest = int(tokens.argmax())
            raise ValueError(
                f"the {name} data set has {too_long} row{'s' * (too_long > 1)} of more than "
                f"max_tokens_per_batch={max_tokens} tokens, the longest is row {self.names[longest]} with "
                f"{tokens[longest]}: give max_tokens_per_batch={tokens[longest]} or more, or a smaller max_length"
            )


@dataclass
class _Batch:
    rows: list[int] = field(default_factory=list)
    prompts: set[int] = field(default_factory=set)
    tokens: int = 0


def fill_batches(order: NDArray[np.int64], tokens: RowTokens, max_tokens: int) -> list[list[int]]:
    """Rows in batches of at most so many tokens.

    Greedily: rows of one prompt that follow one another go together into the first open batch with room for them; where
    none has, the batch that was opened first is closed.

    Args:
        order: of the rows.
        tokens: of the rows, each at most `max_tokens`.
        max_tokens: of a batch.

    Returns:
        The rows of every batch, in the order in which the batches were opened.
    """
    batches: list[_Batch] = []
    for rows in _runs(order, tokens, max_tokens):
        prompt, run = int(tokens.prompts[rows[0]]), int(tokens.own[rows].sum())
        for batch in batches[-OPEN_BATCHES:]:
            added = run + (0 if prompt in batch.prompts else int(tokens.of_prompt[rows[0]]))
            if batch.tokens + added <= max_tokens:
                break
        else:
            batch, added = _Batch(), run + int(tokens.of_prompt[rows[0]])
            batches.append(batch)
        batch.rows += rows
        batch.prompts.add(prompt)
        batch.tokens += added
    return [batch.rows for batch in batches]


def _runs(order: NDArray[np.int64], tokens: RowTokens, max_tokens: int) -> Iterator[list[int]]:
    """Rows of one prompt that follow one another, as many as a batch has room for."""
    run: list[int] = []
    together = 0
    for row in order.tolist():
        together += int(tokens.own[row])
        if run and (tokens.prompts[row] != tokens.prompts[run[0]] or together > max_tokens):
            yield run
            run = []
        if not run:
            together = int(tokens.of_prompt[row] + tokens.own[row])
        run.append(row)
    if run:
        yield run


def spread(batches: list[list[int]], count: int) -> list[list[int]]:
    """The same rows in so many batches, which are no fewer: those of most rows are halved."""
    batches = list(batches)
    while len(batches) < count:
        place = max(range(len(batches)), key=lambda index: len(batches[index]))
        rows = batches[place]
        half = (len(rows) + 1) // 2
        batches[place : place + 1] = [rows[:half], rows[half:]]
    return batches


@dataclass(frozen=True)
class Shares:
    """The share of each process in the batches of an epoch: the first batch goes to the first process, and so on.

    All have as many; in place of a last one that is missing, a batch of `FILLER`.

    Attributes:
        batches: of all processes, the rows of each.
        num_processes: that take a share.
    """

    batches: list[list[int]]
    num_processes: int = 1

    def of(self, process_index: int) -> list[list[int]]:
        """The batches of a process."""
        share = self.batches[process_index :: self.num_processes]
        return share + [[FILLER]] * (math.ceil(len(self.batches) / self.num_processes) - len(share))

    def gathered_rows(self) -> NDArray[np.int64]:
        """The rows in the order in which results come that are gathered batch by batch; FILLER where there is none.

        The results of a batch are padded to as many as those of the largest one that is gathered with it.
        """
        gathered = []
        for together in zip(*map(self.of, range(self.num_processes)), strict=True):
            longest = max(map(len, together))
            gathered += [row for rows in together for row in rows + [FILLER] * (longest - len(rows))]
        return np.array(gathered, np.int64)


class TokenBatchSampler(Sampler[list[int]]):
    """The batches of one process, filled by tokens; every epoch has as many, all batches are filled anew in each.

    `Trainer` counts steps once, for all epochs: as many batches are made as the epoch with most of them needs.

    Args:
        tokens: of the rows.
        max_tokens: of a batch; no row has more.
        seed: of the shuffles; None for the order of the rows.
        epochs: in all of training.
        num_processes: that take a share.
        process_index: of this one.

    Attributes:
        epoch: whose batches come next, from 0.
        num_batches: of all processes in an epoch.
    """

    def __init__(
        self, tokens: RowTokens, max_tokens: int, seed: int | None, epochs: int, num_processes: int, process_index: int
    ) -> None:
        self._tokens, self._max_tokens, self._seed = tokens, max_tokens, seed
        self._num_processes, self._process_index = num_processes, process_index
        self.epoch = 0
        self.num_batches = max(len(self._fill(epoch)) for epoch in range(1 if seed is None else epochs))

    def _fill(self, epoch: int) -> list[list[int]]:
        prompts = self._tokens.prompts
        order = np.arange(len(prompts)) if self._seed is None else shuffled(prompts, self._seed, epoch)
        return fill_batches(order, self._tokens, self._max_tokens)

    def __iter__(self) -> Iterator[list[int]]:
        """The rows of every batch of this process."""
        batches = spread(self._fill(self.epoch), self.num_batches)
        return iter(Shares(batches, self._num_processes).of(self._process_index))

    def __len__(self) -> int:
        return math.ceil(self.num_batches / self._num_processes)


def shuffled(prompts: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Rows in an order that goes by seed and epoch, those of the same prompt one after another: [rows].

    Args:
        prompts: [rows], which one each row has.
        seed: of all epochs.
        epoch: from 0.
    """
    random = np.random.default_rng([seed, epoch])
    rows, ranks = random.permutation(len(prompts)), random.permutation(prompts.max(initial=-1) + 1)
    order: NDArray[np.int64] = rows[np.argsort(ranks[prompts[rows]], kind="stable")]
    return order


class RowsOrFiller(Dataset[dict[str, Any]]):
    """The rows of a tokenised data set by their places; for `FILLER` one that scores nothing, and is in no mean.

    Args:
        dataset: tokenised.
        sampler: that goes by the epoch, which whoever wraps data loaders tells the data set.
    """

    def __init__(self, dataset: datasets.Dataset, sampler: TokenBatchSampler | None = None) -> None:
        self._rows = dataset.select_columns([name for name in dataset.column_names if name in COLLATED_COLUMNS])
        self._sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the sampler, from 0."""
        if self._sampler is not None:
            self._sampler.epoch = epoch

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        """The rows of a batch."""
        rows: list[dict[str, Any]] = self._rows.__getitems__([max(place, 0) for place in places])
        empty: dict[str, list[int]] = {name: [] for name in (*TOKEN_COLUMNS[1:], *UNPAIRED_TOKEN_COLUMNS[1:2])}
        empty["prompt_ids"] = [0, 0]  # a row of one token has none to predict
        return [
            {**row, **{name: empty[name] for name in empty if name in row}} if place == FILLER else row
            for row, place in zip(rows, places, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._rows)
