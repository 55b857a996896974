"""What an import brings with it: nothing heavy before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from dil_kernels.backends import constant_in_graphs


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
