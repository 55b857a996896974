"""The tests on a machine that has little but PyTorch, as a borrowed GPU machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}")

MISSING = ("datasets", "hypothesis", "peft", "transformers")
sys.meta_path.insert(0, Missing())
import pytest
files = ("test_logps.py", "test_peft_training.py", "test_gpu.py")
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", *sys.argv[1:], *(f"tests/{name}" for name in files)]))
"""


def collect(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, *options]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins of the packages that are missing
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_modules_whose_packages_are_missing_are_named_and_the_rest_is_run() -> None:
    result = collect("--bare")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "test_logps.py needs hypothesis, which is not installed" in result.stdout
    assert "test_peft_training.py needs peft, which is not installed" in result.stdout
    assert "tests/test_gpu.py::test_sanitize" in result.stdout


def test_without_being_asked_a_missing_package_is_an_error() -> None:
    result = collect()
    assert result.returncode != 0
    assert "No module named 'hypothesis'" in result.stdout
