"""Tokenised rows that `datasets` has kept are used again only as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import make_pairs, make_tokenizer, write_lines

from dil_kernels.data import load_preference_pairs
from dil_kernels.data.tokenization import tokenize_dataset

LENGTHS = {"max_length": None, "max_prompt_length": None, "truncation_mode": "keep_end"}


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
