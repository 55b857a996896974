"""Tokenised rows that `datasets` has kept are used again only as they were written."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import datasets
import pytest
from file_modes import read_only
from refusals import LENGTHS, said, write_arrow
from tiny_model import make_pairs, make_tokenizer, write_lines

from dil_kernels.data import load_preference_pairs
from dil_kernels.data.mixture import split_off_test
from dil_kernels.data.tokenization import tokenize_dataset


def kept_files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("cache-*") if path.suffix != ".digest"]


@pytest.mark.parametrize("damage", ["a byte", "its beginning", "its end"])
def test_damaged_rows_are_made_again(
    damage: str, tmp_path: Path, datasets_cache: None, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_lines(tmp_path / "data" / "pairs.jsonl", *make_pairs(20))

    def rows() -> list[dict[str, object]]:
        return tokenize_dataset(load_preference_pairs(file), make_tokenizer(), **LENGTHS).to_list()

    whole = rows()
    (kept,) = kept_files(tmp_path / "cache")
    written = kept.read_bytes()
    assert rows() == whole
    assert kept.read_bytes() == written
    assert "made again" not in caplog.text
    damaged = bytearray(written)
    if damage == "its end":
        del damaged[-len(damaged) // 3 :]
    else:
        place = len(damaged) // 2 if damage == "a byte" else 4
        damaged[place] ^= 64
    kept.write_bytes(damaged)
    assert rows() == whole
    assert "rows that were kept cannot be used (" in caplog.text
    caplog.clear()
    assert rows() == whole
    assert "made again" not in caplog.text, "the file is whole again"


@pytest.mark.parametrize(("kept", "processes"), [("pairs", None), ("pairs", 2), ("tokens, damaged", None)])
def test_rows_that_cannot_be_kept_are_held_in_memory(
    kept: str, processes: int | None, tmp_path: Path, datasets_cache: None, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a cache that another user has filled, or an administrator."""
    source = write_lines(tmp_path / "data" / "pairs.jsonl", *make_pairs(20))

    def rows() -> datasets.Dataset:
        return tokenize_dataset(load_preference_pairs(source), make_tokenizer(), num_proc=processes, **LENGTHS)

    load_preference_pairs(source)
    if kept == "tokens, damaged":
        rows()
        (damaged,) = kept_files(tmp_path / "cache")
        damaged.write_bytes(damaged.read_bytes()[:-100])
    caplog.clear()
    with read_only(tmp_path / "cache"):
        held = rows()
    said = [message for message in caplog.messages if "held in memory" in message]
    assert len(said) == 1
    assert said[0].startswith(f"{source}: rows are held in memory, since they cannot be kept on disk: ")
    assert said[0].endswith(": Permission denied")
    assert ("made again" in caplog.text) == (kept == "tokens, damaged")
    assert not held.cache_files
    assert held.to_list() == rows().to_list()


def test_checked_rows_of_a_set_that_cannot_be_kept_are_held_in_memory(
    tmp_path: Path, datasets_cache: None, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_arrow(tmp_path / "data" / "train.arrow", *make_pairs(20)).parent
    (kept,) = datasets.load_dataset(str(source))["train"].cache_files
    with read_only(Path(kept["filename"]).parent):  # not its locks, without which `datasets` reads nothing
        held = load_preference_pairs(source)
    assert f"{source}: rows are held in memory" in caplog.text
    assert held.to_list() == load_preference_pairs(source).to_list()


def test_a_part_is_held_out_of_what_cannot_be_written(tmp_path: Path, datasets_cache: None) -> None:
    pairs = load_preference_pairs(write_lines(tmp_path / "data" / "pairs.jsonl", *make_pairs(20)))
    with read_only(tmp_path / "cache"):
        parts = split_off_test(pairs, 5, seed=0)
    drawn = pairs.train_test_split(5, seed=0)
    assert [part.to_list() for part in parts] == [drawn["train"].to_list(), drawn["test"].to_list()]


def with_reasoning() -> tuple[datasets.Dataset, str]:
    """Conversations, and a template that leaves the reasoning of all but the first out."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    prompt = [said("user", "w1"), said("assistant", "w2", reasoning_content="w9"), said("user", "w3")]
    chosen, rejected = [said("assistant", "w4")], [said("assistant", "w5")]
    plain = {"prompt": [said("user", "w1", reasoning_content=None)], "chosen": chosen, "rejected": rejected}
    return datasets.Dataset.from_list([plain, *[{**plain, "prompt": prompt}] * 599]), template


NOTE = (
    "row 2, column 'prompt', message 2: the chat template leaves out reasoning_content, in training as in generation; "
    "this is said of the first such row alone"
)


@pytest.mark.parametrize("processes", [None, 2])
def test_what_a_template_leaves_out_is_said_of_kept_rows_too(
    processes: int | None, datasets_cache: None, caplog: pytest.LogCaptureFixture
) -> None:
    data, template = with_reasoning()
    for _ in range(2):
        caplog.clear()
        tokenize_dataset(data, make_tokenizer(template), num_proc=processes, **LENGTHS)
        assert [message for message in caplog.messages if "leaves out" in message] == [NOTE]


def test_what_a_template_leaves_out_is_said_where_the_disk_is_full(
    datasets_cache: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = datasets.Dataset.map

    def full(self: datasets.Dataset, *args: Any, **options: Any) -> datasets.Dataset:
        rows = own(self, *args, **options)
        if not options.get("keep_in_memory"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rows

    monkeypatch.setattr(datasets.Dataset, "map", full)
    data, template = with_reasoning()
    tokenize_dataset(data, make_tokenizer(template), **LENGTHS)
    assert "held in memory" in caplog.messages[0]
    assert caplog.messages[1:] == [NOTE]
