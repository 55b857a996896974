"""What `dil-train --help` prints, kept on disk.

Its options are the fields of classes of transformers and peft, whose import brings accelerate and bitsandbytes:
seconds, for a text that changes only with what is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

from dil_kernels.divergences import divergence_names

PACKAGE = Path(__file__).parent


def help_text() -> str:
    """The text, from the cache of the user (XDG_CACHE_HOME) where that is of these very sources and versions."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dil_kernels" / "help.txt"
    key = _key()
    try:
        kept, _, text = path.read_text(encoding="utf-8").partition("\n")
        if kept == key:
            return text
    except (OSError, UnicodeDecodeError):
        pass
    from dil_kernels.arguments import build_parser

    text = build_parser().format_help()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(f"{key}\n{text}")
        os.replace(file.name, path)
    except OSError:  # it is written for speed alone
        pass
    return text


def _key() -> str:
    """Of all that the text depends on."""
    versions = [sys.version, importlib.metadata.version("transformers")]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions.append(importlib.metadata.version("peft"))
    parts = [*versions, *divergence_names(), str(sys.stdout.isatty())]
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".yaml"):
            status = path.stat()
            parts.append(f"{path} {status.st_mtime_ns} {status.st_size}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
