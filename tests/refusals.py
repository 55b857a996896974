"""What the tests of reading data share: pairs, and what is said of data that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from tiny_model import make_tokenizer

from dil_kernels.data import PreferenceDataError, load_preference_pairs
from dil_kernels.data.tokenization import tokenize_dataset

LENGTHS = {"max_length": None, "max_prompt_length": None, "truncation_mode": "keep_end"}


def said(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


PLAIN = {"prompt": "w1 w2 ", "chosen": "w3 w4", "rejected": "w5"}
CHAT = {
    "prompt": [said("system", "w9"), said("user", "w1 w2")],
    "chosen": [said("assistant", "w3 w4")],
    "rejected": [said("assistant", "w5")],
}
ASKED = [said("user", "w1")]
ONE_TURN = {"prompt": ASKED, "chosen": [said("assistant", "w3")], "rejected": [said("assistant", "w4")]}


def refusal(source: Path | str, **options: Any) -> str:
    with pytest.raises(PreferenceDataError) as caught:
        load_preference_pairs(source, **options)
    return str(caught.value)


def tokenising_refusal(dataset: datasets.Dataset) -> str:
    with pytest.raises(PreferenceDataError) as caught:
        tokenize_dataset(dataset, make_tokenizer(), **LENGTHS)
    return str(caught.value)


def write_arrow(path: Path, *rows: dict[str, object]) -> Path:
    """A file of a format that `datasets` reads, of a directory of which it keeps the checked rows, too."""
    table = pa.Table.from_pylist([*rows])
    path.parent.mkdir(exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path
