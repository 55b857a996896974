"""`python -m dil_kernels.cli` is `dil-train`."""

import sys

from dil_kernels.cli.programs import main

if __name__ == "__main__":
    sys.exit(main())
