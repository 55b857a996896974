"""Bytes as a file of preference data: its pairs, or one error that says what is wrong."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path
from typing import Any

from tiny_model import make_tokenizer

from dil_kernels.data import PreferenceDataError, load_preference_pairs
from dil_kernels.data.tokenization import tokenize_dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
TOKENIZER = make_tokenizer()
FOLDER = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
LENGTHS: dict[str, Any] = {"max_length": None, "max_prompt_length": None, "truncation_mode": "keep_end"}


def one_input(data: bytes) -> None:
    """The first byte is the kind of file, and whether a .gz is a whole one of the rest."""
    if not data:
        return
    suffix = SUFFIXES[data[0] % len(SUFFIXES)]
    content = data[1:]
    if suffix.endswith(".gz") and data[0] < 128:
        content = gzip.compress(content, compresslevel=1, mtime=0)
    path = Path(FOLDER.name) / f"pairs{suffix}"
    path.write_bytes(content)
    first = _read(path)
    if first is None:
        return
    assert first == _read(path), "the same file gives other pairs"
    for pair in first:
        check(pair)
    try:
        rows = tokenize_dataset(load_preference_pairs(path), TOKENIZER, **LENGTHS)
    except PreferenceDataError:
        return
    for row in rows:
        assert row["prompt_ids"]
        assert all(ids for name, ids in row.items() if name.endswith("_ids")), row


def _read(path: Path) -> list[dict[str, Any]] | None:
    try:
        return load_preference_pairs(path).to_list()
    except PreferenceDataError as error:
        if not str(error).startswith(str(path)):
            raise AssertionError("the error does not name the file") from error
        return None


def check(pair: dict[str, Any]) -> None:
    """It has what docs/training.md promises."""
    columns = {"prompt", "completion", "label"} if "label" in pair else {"prompt", "chosen", "rejected"}
    assert columns <= {*pair}, pair
    texts = [pair[name] for name in columns - {"label"}]
    assert len({type(text) for text in texts}) == 1, pair
    for text in texts:
        assert isinstance(text, str | list), pair
