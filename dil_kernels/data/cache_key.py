"""What checked and tokenised rows depend on beside the data: the code, which `datasets` does not see in its key."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

PACKAGES = ("datasets", "jinja2", "tokenizers", "transformers")


@functools.cache
def code_key() -> str:
    """A digest of this package's code that makes rows, and the versions of the packages that it makes them with."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return " ".join([source_digest(Path(__file__).parents[1]), *versions])


def source_digest(package: Path) -> str:
    """A digest of the modules that rows depend on, under the directory of the package."""
    digest = hashlib.sha256()
    for file in sorted((package / "data").glob("*.py")):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()
