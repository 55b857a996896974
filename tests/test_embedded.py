"""The embedded preference pairs are what preference_pairs.md says of them."""

from __future__ import annotations

import difflib

import pytest

from dil_kernels.quickstart.embedded import SPLITS, load_embedded_pairs

PAIRS = {split: load_embedded_pairs(split).to_list() for split in SPLITS}
ALL = PAIRS["train"] + PAIRS["test"]


def text(pair: dict, side: str) -> str:
    return pair[side][-1]["content"]


def test_counts_and_form() -> None:
    assert {split: len(pairs) for split, pairs in PAIRS.items()} == {"train": 300, "test": 60}
    for pair in ALL:
        assert [message["role"] for message in pair["prompt"]] == ["user"]
        for side in ("chosen", "rejected"):
            assert [message["role"] for message in pair[side]] == ["assistant"]
            assert text(pair, side) == text(pair, side).strip() != ""


def test_nothing_is_there_twice() -> None:
    prompts = [text(pair, "prompt").lower() for pair in ALL]
    assert len(set(prompts)) == len(prompts)
    assert len({text(pair, "chosen") for pair in ALL} | {text(pair, "rejected") for pair in ALL}) == 2 * len(ALL)


def test_no_held_out_pair_is_nearly_one_of_the_training_pairs() -> None:
    for side, limit in (("prompt", 0.93), ("rejected", 0.9)):
        for held_out in PAIRS["test"]:
            near = difflib.get_close_matches(text(held_out, side), [text(p, side) for p in PAIRS["train"]], 1, limit)
            assert near == [], (text(held_out, side), near)


def test_an_unknown_split() -> None:
    with pytest.raises(ValueError, match="split must be one of train, test, got 'validation'"):
        load_embedded_pairs("validation")
