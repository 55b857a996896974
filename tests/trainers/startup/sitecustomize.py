"""Python imports this file by its name at the start of every process that has its folder on PYTHONPATH."""

import os

if os.environ.get("DIL_VERIFY"):
    import verify_losses  # noqa: F401
if os.environ.get("DIL_CPU_FOR_CUDA"):
    import cpu_for_cuda  # noqa: F401
