"""Where the links of a page lead on the site: a page may stand for a file that lies elsewhere in the repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
INCLUDED = {  # by its page
    "index.md": "README.md",
    "experiments.md": "experiments/README.md",
    "emulator.md": "tests/ptxemu/README.md",
    "embedded_pairs.md": "dil_kernels/quickstart/preference_pairs.md",
    "recipes.md": "dil_kernels/recipes/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
# As GitHub's workflows say; a site built by hand carries copies of the files to which it links.
REPOSITORY = "/".join(os.environ.get(name, "") for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY")).strip("/")


def relocated(text: str, page: Path, repository: str = REPOSITORY) -> str:
    """The text with its relative links leading from `page`, in docs/, to what they name.

    That is another page, or a file of the repository: on GitHub where that is known, else a copy of it.

    Raises:
        FileNotFoundError: one leads to no file.
    """
    source = ROOT / INCLUDED.get(page.name, f"docs/{page.relative_to(DOCS)}")
    pages = {ROOT / path: DOCS / name for name, path in INCLUDED.items()}

    def lead(match: re.Match[str]) -> str:
        path, hash_, anchor = match["target"].partition("#")
        file = (source.parent / path).resolve()
        if not file.is_file():
            raise FileNotFoundError(f"{source.relative_to(ROOT)} links to {path}, which is no file")
        file = pages.get(file, file)
        if repository and DOCS not in file.parents and file.suffix != ".png":
            return f"]({repository}/blob/main/{file.relative_to(ROOT)}{hash_}{anchor})"
        return f"]({os.path.relpath(file, page.parent)}{hash_}{anchor})"

    return re.sub(r"\]\((?!https?:|#)(?P<target>[^)\s]+)\)", lead, text)


def text_of(page: Path) -> str:
    """What a page of docs/ says: its own text, with that of the file for which it stands."""
    text = page.read_text(encoding="utf-8")
    if page.name in INCLUDED:
        line = f"```{{include}} ../{INCLUDED[page.name]}\n```\n"
        if line not in text:
            raise ValueError(f"docs/{page.name} does not include {INCLUDED[page.name]}")
        text = text.replace(line, (ROOT / INCLUDED[page.name]).read_text(encoding="utf-8"))
    return relocated(text, page)
