"""Batches filled by tokens: no more than allowed, every row once, the same on all processes, as many in every epoch."""

from __future__ import annotations

import itertools
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dil_kernels.data.batches import Batch
from dil_kernels.data.collators import PackedCollator, PreferenceCollator, SharedPrefixCollator
from dil_kernels.data.token_batches import (
    FILLER,
    RowsOrFiller,
    RowTokens,
    Shares,
    TokenBatchSampler,
    fill_batches,
    shuffled,
    spread,
)

Rows = list[dict[str, Any]]
COLLATORS: dict[bool, Any] = {False: PackedCollator(), True: SharedPrefixCollator()}
IDS = st.lists(st.integers(2, 9), max_size=6)


@st.composite
def data_sets(draw: st.DrawFn) -> Rows:
    """Pairs or unpaired responses to up to 4 prompts, of which one may be empty."""
    prompts = st.sampled_from(draw(st.lists(IDS, min_size=1, max_size=4)))
    columns = draw(st.sampled_from([("chosen_ids", "rejected_ids"), ("completion_ids",)]))
    row = st.fixed_dictionaries({"prompt_ids": prompts, **dict.fromkeys(columns, IDS)})
    rows = draw(st.lists(row, min_size=1, max_size=30))
    return [{**row, "label": True} for row in rows] if len(columns) == 1 else rows


def as_data_set(rows: Rows) -> datasets.Dataset:
    ids = datasets.Sequence(datasets.Value("int64"))
    features = {name: datasets.Value("bool") if name == "label" else ids for name in rows[0]}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def length(rows: Rows, shared: bool) -> int:
    return int(COLLATORS[shared](rows)["input_ids"].shape[1])


def together(run: list[int], rows: Rows) -> list[int]:
    """The first rows of a run, those of one prompt."""
    return list(itertools.takewhile(lambda x: rows[x]["prompt_ids"] == rows[run[0]]["prompt_ids"], run))


@given(data_sets(), st.booleans(), st.integers(0, 40), st.integers(0, 3))
def test_batches_are_as_full_as_the_budget_allows(rows: Rows, shared: bool, room: int, epoch: int) -> None:
    """Counted in what the collator makes of them."""
    tokens = RowTokens.of(as_data_set(rows), shared=shared)
    alone = [length([row], shared) for row in rows]
    assert (tokens.of_prompt + tokens.own).clip(2).tolist() == alone  # no row has fewer positions
    budget = max(alone) + room
    batches = fill_batches(shuffled(tokens.prompts, 7, epoch), tokens, budget)
    assert sorted(itertools.chain(*batches)) == [*range(len(rows))]
    for batch in batches:
        assert length([rows[place] for place in batch], shared) <= budget
    for first, second in itertools.pairwise(batches):  # the one was open when there was no room in it for the other
        run = together(second, rows) if shared else second[:1]
        assert length([rows[place] for place in first + run], shared) > budget
    if shared:
        for prompt in {tuple(row["prompt_ids"]) for row in rows}:
            places = {place for place, row in enumerate(rows) if tuple(row["prompt_ids"]) == prompt}
            if length([rows[place] for place in places], shared) <= budget:
                assert sum(bool(places & {*batch}) for batch in batches) == 1


def test_a_batch_that_was_opened_long_ago_takes_no_more() -> None:
    tokens = RowTokens(np.arange(30), np.zeros(30, np.int64), np.array([3] + [6] * 28 + [1]), range(30))
    assert fill_batches(np.arange(30), tokens, 8)[-16] == [13, 29]


@given(data_sets(), st.booleans(), st.integers(0, 40), st.integers(1, 4), st.integers(0, 99))
def test_processes_share_the_batches_of_every_epoch(
    rows: Rows, shared: bool, room: int, processes: int, seed: int
) -> None:
    tokens = RowTokens.of(as_data_set(rows), shared=shared)
    budget = max(2, int((tokens.of_prompt + tokens.own).max())) + room
    samplers = [TokenBatchSampler(tokens, budget, seed, 3, processes, index) for index in range(processes)]
    for epoch in range(3):
        for sampler in samplers:
            sampler.epoch = epoch
        shares = [[*sampler] for sampler in samplers]
        assert shares == [[*sampler] for sampler in samplers]
        assert {len(share) for share in shares} == {len(sampler) for sampler in samplers} == {len(samplers[0])}
        dealt = [batch for batches in zip(*shares, strict=True) for batch in batches]
        assert dealt[samplers[0].num_batches :] == [[FILLER]] * (len(dealt) - samplers[0].num_batches)
        assert len(dealt) - samplers[0].num_batches < processes
        assert sorted(itertools.chain(*dealt[: samplers[0].num_batches])) == [*range(len(rows))]
        assert all(length([rows[place] for place in batch], shared) <= budget for batch in dealt if FILLER not in batch)


def test_an_epoch_is_made_by_seed_and_epoch() -> None:
    prompts = np.arange(40) % 25
    orders = {(seed, epoch): shuffled(prompts, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert shuffled(prompts, 1, 1).tolist() == orders[1, 1]
    for order in orders.values():
        assert sorted(order) == [*range(40)]
        assert len([*itertools.groupby(prompts[order].tolist())]) == 25


def sampler_of(processes: int, index: int, epochs: int = 3, seed: int | None = 3) -> TokenBatchSampler:
    lengths = np.random.default_rng(0).integers(5, 60, 83)
    return TokenBatchSampler(
        RowTokens(np.arange(83), np.zeros(83, np.int64), lengths, range(83)), 100, seed, epochs, processes, index
    )


def test_an_optimizer_step_has_the_same_rows_however_it_is_split() -> None:
    steps = []
    for processes, accumulated in ((1, 4), (2, 2), (4, 1)):
        samplers = [sampler_of(processes, index) for index in range(processes)]
        for sampler in samplers:
            sampler.epoch = 1
        shares = [[*sampler] for sampler in samplers]
        starts = range(0, len(shares[0]), accumulated)
        micro_batches = [[batch for share in shares for batch in share[i : i + accumulated]] for i in starts]
        steps.append([sorted(row for batch in step for row in batch if row != FILLER) for step in micro_batches])
    assert steps[0] == steps[1] == steps[2]


def test_all_epochs_have_as_many_batches_as_the_one_that_needs_most() -> None:
    alone = [sampler_of(1, 0, epochs=1, seed=seed) for seed in range(3, 30)]
    assert len({sampler.num_batches for sampler in alone}) > 1
    longer = sampler_of(1, 0, epochs=50)
    assert longer.num_batches > sampler_of(1, 0, epochs=1).num_batches
    assert len([*longer]) == longer.num_batches


def test_halved_batches_have_the_same_rows_in_the_same_order() -> None:
    assert spread([[1, 2], [3, 4, 5], [6]], 5) == [[1], [2], [3, 4], [5], [6]]
    assert spread([[1, 2], [3]], 2) == [[1, 2], [3]]


def test_without_a_seed_the_rows_come_as_they_are() -> None:
    sampler = sampler_of(1, 0, seed=None)
    first = [*sampler]
    sampler.epoch = 1
    assert [*sampler] == first
    assert first[0][0] == 0


def test_gathered_results_are_told_apart_from_padding() -> None:
    shares = Shares([[4, 1], [0], [2, 5, 6], [3], [7]], 2)
    assert (shares.of(0), shares.of(1)) == ([[4, 1], [2, 5, 6], [7]], [[0], [3], [FILLER]])
    assert shares.gathered_rows().tolist() == [4, 1, 0, -1, 2, 5, 6, 3, -1, -1, 7, -1]


@pytest.mark.parametrize("collator", [PreferenceCollator(0), PackedCollator(), SharedPrefixCollator()], ids=type)
def test_a_filler_scores_nothing(collator: Any) -> None:
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "ref_chosen_logps": -1.5, "other": "x"}
    for row in (pair, {"prompt_ids": [5, 6], "completion_ids": [7], "label": True}):
        rows = RowsOrFiller(datasets.Dataset.from_list([row, row]))
        assert rows.__getitems__([1, 0])[0] == {name: row[name] for name in row if name != "other"}
        (filler,) = rows.__getitems__([FILLER])
        batch = Batch.of(collator([filler]))
        assert batch.scored_counts().tolist() == [0, 0]
        assert batch.num_scored == 0
        assert batch.labels.shape[-1] > 1


def test_a_row_longer_than_a_batch_is_named() -> None:
    rows = [{"prompt_ids": [1] * 4, "chosen_ids": [2] * n, "rejected_ids": [3], "row": n} for n in (2, 9, 7)]
    dataset = datasets.Dataset.from_list(rows)
    for shared, counts in ((False, [11, 18, 16]), (True, [8, 15, 13])):
        tokens = RowTokens.of(dataset, shared=shared)
        tokens.refuse_longer_than(counts[1], "train")
        message = (
            f"the eval data set has 2 rows of more than max_tokens_per_batch={counts[0]} tokens, the longest is row 9 "
            f"with {counts[1]}: give max_tokens_per_batch={counts[1]} or more, or a smaller max_length"
        )
        with pytest.raises(ValueError, match=message):
            tokens.refuse_longer_than(counts[0], "eval")
    without_names = RowTokens.of(dataset.remove_columns("row"), shared=True)
    with pytest.raises(ValueError, match=r"1 row of .*the longest is row 2 with 15"):
        without_names.refuse_longer_than(14, "train")
