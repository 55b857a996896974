"""A batch: padded or packed, in pairs or not, it answers the same questions alike."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets")

from dil_kernels.data.batches import IGNORE_INDEX, Batch, Packed, Padded
from dil_kernels.data.collators import PackedCollator, PreferenceCollator

IDS = st.lists(st.integers(2, 287), max_size=6)
PROMPT = st.lists(st.integers(2, 287), min_size=1, max_size=6)
LOGP = st.floats(-50, 0, width=32)
PAIR = {"prompt_ids": PROMPT, "chosen_ids": IDS, "rejected_ids": IDS, "ref_chosen_logps": LOGP}
PAIR["ref_rejected_logps"] = LOGP
RESPONSE = {"prompt_ids": PROMPT, "completion_ids": IDS, "label": st.booleans(), "ref_logps": LOGP}
ROWS = st.one_of(st.lists(st.fixed_dictionaries(kind), min_size=1, max_size=5) for kind in (PAIR, RESPONSE))


def both_layouts(rows: list[dict[str, Any]]) -> tuple[Batch, Batch]:
    return Batch.of(PreferenceCollator(0, pad_to_multiple_of=4)(rows)), Batch.of(PackedCollator()(rows))


@given(ROWS)
def test_both_layouts_answer_as_the_rows_say(rows: list[dict[str, Any]]) -> None:
    padded, packed = both_layouts(rows)
    assert isinstance(padded.layout, Padded)
    assert isinstance(packed.layout, Packed)
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
    for batch in (padded, packed):
        assert batch.num_sequences == len(lengths)
        assert batch.num_scored == sum(lengths)
        assert batch.sums(batch.labels[..., 1:] != IGNORE_INDEX).tolist() == lengths
        assert batch.has_scored_token().tolist() == [length > 0 for length in lengths]
        assert batch.scored_counts().tolist() == counts
        assert (None if batch.is_chosen is None else batch.is_chosen.tolist()) == labels
        assert {name: values.tolist() for name, values in batch.given_ref_logps.items()} == refs


def test_reference_log_probs_that_a_collator_lost_are_missed() -> None:
    row = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7], "ref_chosen_logps": -1.0}
    for batch in both_layouts([row]):
        with pytest.raises(KeyError, match="ref_rejected_logps"):
            batch.ref_logps(options=None)
