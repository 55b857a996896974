"""What `dil-train --help` prints, kept on disk.

Its options are the fields of classes of transformers and peft, whose import brings accelerate and bitsandbytes:
seconds, for a text that changes only with what is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from pathlib import Path

from dil_kernels.cli.environment import version_of
from dil_kernels.cli.option_names import help_width
from dil_kernels.losses import divergence_names
from dil_kernels.user_cache import make_private

PACKAGE = Path(__file__).parents[1]


def help_text() -> str:
    """The text, from the cache of the user (XDG_CACHE_HOME) where that is of these very sources and versions."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not cache.is_absolute():  # there is no home
        return _make_text()
    directory = cache / "dil_kernels"
    path, key = directory / "help.txt", _key()
    try:
        kept, _, text = path.read_text(encoding="utf-8").partition("\n")
        if kept == key:
            return text
    except (OSError, UnicodeDecodeError):
        pass
    text = _make_text()
    with contextlib.suppress(OSError):  # it is written for speed alone
        make_private(directory)
        with tempfile.TemporaryDirectory(dir=directory) as fresh:
            (Path(fresh) / path.name).write_text(f"{key}\n{text}", encoding="utf-8")
            os.replace(Path(fresh) / path.name, path)
    return text


def _make_text() -> str:
    from dil_kernels.cli.arguments import build_parser

    return build_parser().format_help()


def _key() -> str:
    """Of all that the text depends on."""
    parts = [str(help_width()), sys.version, *map(version_of, ("torch", "transformers", "peft")), *divergence_names()]
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".yaml"):
            status = path.stat()
            parts.append(f"{path} {status.st_mtime_ns} {status.st_size}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
