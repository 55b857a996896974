"""`python -m dil_kernels.quickstart`."""

import sys

from dil_kernels.quickstart.run import main

if __name__ == "__main__":
    sys.exit(main())
