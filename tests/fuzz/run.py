"""`python run.py TARGET CORPUS... [options of libFuzzer]`: coverage-guided fuzzing of a target, by atheris."""

import importlib
import logging
import sys
import warnings
from pathlib import Path

import atheris
import datasets

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
datasets.disable_progress_bars()
datasets.disable_caching()
name = sys.argv.pop(1)
with atheris.instrument_imports(include=["dil_kernels"], enable_loader_override=False):
    target = importlib.import_module(name)
atheris.Setup(sys.argv, target.one_input)
atheris.Fuzz()
