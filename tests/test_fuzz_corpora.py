"""What `make fuzz` starts from, and what it has found: each input gives a result or an error that says why."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
LARGEST = 4096  # bytes of an input


@pytest.mark.parametrize("name", ["ops", "readers"])
def test_every_input_of_the_corpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FUZZ), *sys.path])
    target = importlib.import_module(name)
    inputs = sorted((FUZZ / "corpus" / name).iterdir())
    assert len(inputs) >= 10
    for path in inputs:
        data = path.read_bytes()
        assert len(data) <= LARGEST, path.name
        target.one_input(data)
