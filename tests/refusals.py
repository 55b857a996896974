"""What the tests of reading data share: files, a cache of their own, and what is said of data that are refused."""

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


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(PreferenceDataError) as caught:
        load_preference_pairs(source, **options)
    return str(caught.value)


def tokenising_refusal(dataset: datasets.Dataset) -> str:
    with pytest.raises(PreferenceDataError) as caught:
        tokenize_dataset(dataset, make_tokenizer(), **LENGTHS)
    return str(caught.value)
