"""What an import brings with it: nothing heavy before it is needed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dil_kernels.backends import constant_in_graphs
from dil_kernels.cli import help_text

HELP = """
import json, sys
from dil_kernels.cli import programs
try:
    programs.main(["--help"])
except SystemExit as end:
    assert end.code == 0
print(json.dumps([*sys.modules]), file=sys.stderr)
"""


def imported_by(statement: str) -> set[str]:
    """The modules that a statement imports in a fresh process, beyond those of torch."""
    code = f"import json, sys, torch; of_torch = {{*sys.modules}}; {statement}; found = {{*sys.modules}} - of_torch"
    code += "; print(json.dumps([*found]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_the_package_imports_little_beside_torch() -> None:
    """Neither the compiler nor Triton nor anything of the extras."""
    found = imported_by("import dil_kernels")
    assert "dil_kernels.functional.linear" in found
    assert not found & {"torch._dynamo", "triton", "sympy", "transformers", "datasets", "accelerate", "trl", "peft"}


def test_constants_are_marked_as_torch_marks_them() -> None:
    def ours() -> None: ...

    def theirs() -> None: ...

    assert vars(constant_in_graphs(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_help_imports_no_trainer_once_it_is_kept(tmp_path: Path) -> None:
    """And says nothing beside its text: bitsandbytes would, at its import."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    first, second = (
        subprocess.run([sys.executable, "-c", HELP], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert "--learning-rate" in first.stdout
    assert second.stdout == first.stdout
    (modules,) = first.stderr.splitlines()
    assert "transformers.training_args" in json.loads(modules)
    (modules,) = second.stderr.splitlines()
    heavy = {"torch._dynamo", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "pandas", "triton"}
    assert not heavy & set(json.loads(modules))


def test_kept_help_of_other_sources_is_not_shown(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "dil_kernels").mkdir()
    kept = tmp_path / "dil_kernels" / "help.txt"
    kept.write_text("another key\nstale")
    text = help_text.help_text()
    assert "--learning-rate" in text
    assert kept.read_text() == f"{help_text._key()}\n{text}"
    assert [path.name for path in kept.parent.iterdir()] == ["help.txt"]
    monkeypatch.setattr(help_text, "divergence_names", lambda: ["one", "more"])
    assert not kept.read_text().startswith(help_text._key())
    monkeypatch.undo()
    version = importlib.metadata.version  # the default of optim goes by that of torch
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.7.0" if name == "torch" else version(name))
    assert not kept.read_text().startswith(help_text._key())


def test_help_needs_no_home(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # in which no directory can be made
    assert "--learning-rate" in help_text.help_text()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", lambda: pytest.fail("which raises where there is none"))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where there is none
    assert "--learning-rate" in help_text.help_text()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
