"""Every example runs as it is and learns."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the extra [trl]")

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {  # the command, and how far its loss must fall in 20 steps
    "pytorch_loop": ("pytorch_loop.py", 0.2),
    "hf_trainer": ("hf_trainer.py", 0.15),
    "trl_trainer": ("trl_trainer.py", 0.15),
    "trl_trainer with LoRA": ("trl_trainer.py --lora --learning-rate 0.01", 0.01),  # the layers below are random
    "accelerate_loop": ("accelerate_loop.py", 0.2),
    "lightning_loop": ("lightning_loop.py", 0.2),
}


@pytest.fixture
def example_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "shared", raising=False)


@pytest.mark.parametrize(("command", "fall"), RUNS.values(), ids=RUNS)
def test_an_example_runs_and_learns(
    command: str,
    fall: float,
    example_path: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, *options = command.split()
    script = str(EXAMPLES / script)
    monkeypatch.setattr(sys, "argv", [script, *options, "--steps", "20"])
    runpy.run_path(script, run_name="__main__")
    losses = [float(value) for value in re.findall(r"\bloss'?:? '?(-?\d+\.\d+)", capsys.readouterr().out)]
    assert -0.65 < losses[0] <= -0.499, "LSIF is -1/2 where the policy is the reference"
    assert losses[-1] < losses[0] - fall
