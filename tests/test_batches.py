"""A batch: padded, packed or with each prompt once, in pairs or not, it answers the same questions alike."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets")

from dil_kernels.data.batches import IGNORE_INDEX, Batch, Packed, Padded, SharedPrefixes
from dil_kernels.data.collators import PackedCollator, PreferenceCollator, SharedPrefixCollator

IDS = st.lists(st.integers(2, 287), max_size=6)
PROMPT = st.lists(st.integers(2, 287), min_size=1, max_size=6)
LOGP = st.floats(-50, 0, width=32)
PAIR = {"prompt_ids": PROMPT, "chosen_ids": IDS, "rejected_ids": IDS, "ref_chosen_logps": LOGP}
PAIR["ref_rejected_logps"] = LOGP
RESPONSE = {"prompt_ids": PROMPT, "completion_ids": IDS, "label": st.booleans(), "ref_logps": LOGP}
ROWS = st.one_of(st.lists(st.fixed_dictionaries(kind), min_size=1, max_size=5) for kind in (PAIR, RESPONSE))


def all_layouts(rows: list[dict[str, Any]]) -> list[Batch]:
    collators = (PreferenceCollator(0, pad_to_multiple_of=4), PackedCollator(), SharedPrefixCollator())
    return [Batch.of(collator(rows)) for collator in collators]


@given(ROWS)
def test_every_layout_answers_as_the_rows_say(rows: list[dict[str, Any]]) -> None:
    batches = all_layouts(rows)
    assert [type(batch.layout) for batch in batches] == [Padded, Packed, SharedPrefixes]
    if "label" in rows[0]:
        sides, labels = ["completion"], [row["label"] for row in rows]
        scored = [bool(row["completion_ids"]) for row in rows]
        chosen = [label and some for label, some in zip(labels, scored, strict=True)]
        counts = [sum(chosen), sum(scored) - sum(chosen)]
    else:
        sides, labels = ["chosen", "rejected"], None
        counts = [sum(bool(row["chosen_ids"] and row["rejected_ids"]) for row in rows)] * 2
    lengths = [len(row[f"{side}_ids"]) for side in sides for row in rows]
    refs = {name: [row[name] for row in rows] for name in rows[0] if name.startswith("ref_")}
    for batch in batches:
        assert batch.num_scored == sum(lengths)
        assert batch.sums(batch.labels[..., 1:] != IGNORE_INDEX).tolist() == lengths
        assert batch.has_scored_token().tolist() == [length > 0 for length in lengths]
        assert batch.scored_counts().tolist() == counts
        assert (None if batch.is_chosen is None else batch.is_chosen.tolist()) == labels
        assert {name: values.tolist() for name, values in batch.given_ref_logps.items()} == refs


@pytest.mark.parametrize(("prompt", "completion"), [([], []), ([5], []), ([], [6])])
@pytest.mark.parametrize("count", [1, 3])
def test_where_nothing_can_be_scored_a_row_has_two_positions(
    prompt: list[int], completion: list[int], count: int
) -> None:
    pair = {"prompt_ids": prompt, "chosen_ids": completion, "rejected_ids": completion}
    unpaired = {"prompt_ids": prompt, "completion_ids": completion, "label": True}
    for row, responses in ((pair, 2), (unpaired, 1)):
        for batch in all_layouts([row] * count):
            assert batch.labels.shape[-1] >= 2
            assert batch.num_scored == 0
            assert batch.has_scored_token().tolist() == [False] * responses * count


def test_reference_log_probs_that_a_collator_lost_are_missed() -> None:
    row = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7], "ref_chosen_logps": -1.0}
    for batch in all_layouts([row]):
        with pytest.raises(KeyError, match="ref_rejected_logps"):
            batch.ref_logps(options=None)


def test_token_ids_that_are_no_integers_are_refused() -> None:
    pair = {"prompt_ids": [1], "chosen_ids": [4.0, 5.7], "rejected_ids": [2]}
    for collator in (PreferenceCollator(0), PackedCollator(), SharedPrefixCollator()):
        with pytest.raises(TypeError, match="sequences must be pairs of token ids, integers each: 'float'"):
            collator([pair])


def test_reference_log_probs_of_some_rows_are_not_dropped() -> None:
    pairs = [{"prompt_ids": [1], "chosen_ids": [4], "rejected_ids": [2]}] * 2
    with pytest.raises(KeyError, match="ref_chosen_logps"):
        PreferenceCollator(0)([pairs[0], {**pairs[1], "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}])
