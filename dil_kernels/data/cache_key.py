"""What checked and tokenised rows depend on: content of files, and code, which `datasets` does not see in its key."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import xxhash

BLOCK = 2**20  # bytes that are read at a time
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


def file_digest(path: Path) -> str:
    """A digest of the content of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
