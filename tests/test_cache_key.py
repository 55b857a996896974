"""What `datasets` keeps of tokenised rows is not used for other code."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pytest
from tiny_model import make_pairs, make_tokenizer

import dil_kernels
from dil_kernels.data import tokenization
from dil_kernels.data.cache_key import code_key, source_digest


def test_kept_rows_are_those_of_the_same_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pairs(3).save_to_disk(tmp_path / "pairs")
    pairs = datasets.load_from_disk(tmp_path / "pairs")
    runs = []
    for key in (code_key(), code_key(), "other code"):
        monkeypatch.setattr(tokenization, "code_key", lambda key=key: key)
        tokenization.tokenize_dataset(
            pairs, make_tokenizer(), max_length=None, max_prompt_length=None, truncation_mode="keep_end"
        )
        runs.append(len(list((tmp_path / "pairs").glob("cache-*.arrow"))))
    assert runs == [1, 1, 2]


@pytest.mark.parametrize("name", ["loading.py", "pairs.py", "tokenization.py", "encoding.py", "markers.py"])
def test_the_key_is_of_the_code_that_makes_rows(tmp_path: Path, name: str) -> None:
    package = Path(dil_kernels.__file__).parent
    copy = tmp_path / "copy"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    assert source_digest(copy) == source_digest(package)
    (copy / "losses.py").write_text("")
    assert source_digest(copy) == source_digest(package), "losses make no rows"
    (copy / "data" / name).write_text((copy / "data" / name).read_text() + "\n")
    assert source_digest(copy) != source_digest(package)
