"""`python replay.py TARGET DIRECTORY...`: every input in there once, for sanitizers beside which atheris cannot run."""

import importlib
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
warnings.simplefilter("ignore")
target = importlib.import_module(sys.argv[1])
inputs = [path for folder in sys.argv[2:] for path in sorted(Path(folder).iterdir())]
for path in inputs:
    print(path.name, end="\r", flush=True)  # the last one, where it ends the process
    target.one_input(path.read_bytes())
print(f"{len(inputs)} inputs of {sys.argv[1]}: nothing found")
