"""What runs of `forked.py` need; a process that has imported it is forked for each."""

import contextlib
import importlib

for name in (
    "fault_runs",
    "dil_kernels.cli.programs",
    "dil_kernels.data.mixture",
    "dil_kernels.training.preflight",
    "dil_kernels.training.run",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(name)
with contextlib.suppress(ImportError):  # without TRL
    importlib.import_module("dil_kernels.integrations.trl")
