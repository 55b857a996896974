"""`python -m dil_kernels.recipes [NAME]`: where a recipe or a config of accelerate is; without a name, all of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dil_kernels.recipes import accelerate_configs, packaged_recipes


def main(argv: Sequence[str] | None = None) -> int:
    """Print a path, or all names with theirs; status 2 for an unknown name."""
    names = sys.argv[1:] if argv is None else argv
    files = {**packaged_recipes(), **accelerate_configs()}
    unknown = [name for name in names if name not in files]
    if unknown:
        print(f"no file is called {', '.join(unknown)}; there are {', '.join(files)}", file=sys.stderr)
        return 2
    for name in names:
        print(files[name])
    for name, path in files.items() if not names else ():
        print(f"{name:<26}{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
