"""What the tests of reading data share: pairs, files, and what is said of data that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_model import make_tokenizer

from dil_kernels.data import PreferenceDataError, load_preference_pairs
from dil_kernels.data.tokenization import tokenize_dataset

LENGTHS = {"max_length": None, "max_prompt_length": None, "truncation_mode": "keep_end"}


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


PLAIN = {"prompt": "w1 w2 ", "chosen": "w3 w4", "rejected": "w5"}
CHAT = {
    "prompt": [message("system", "w9"), message("user", "w1 w2")],
    "chosen": [message("assistant", "w3 w4")],
    "rejected": [message("assistant", "w5")],
}


def write_lines(path: Path, *lines: Any) -> Path:
    """A line of JSON for each; strings are lines as they are."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def refusal(source: Path | str, **options: Any) -> str:
    with pytest.raises(PreferenceDataError) as caught:
        load_preference_pairs(source, **options)
    return str(caught.value)


def tokenising_refusal(dataset: datasets.Dataset) -> str:
    with pytest.raises(PreferenceDataError) as caught:
        tokenize_dataset(dataset, make_tokenizer(), **LENGTHS)
    return str(caught.value)
