"""The documentation site: built strictly, with every public name, and nothing of it from elsewhere."""

from __future__ import annotations

import ast
import dataclasses
import html
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import dil_kernels
from dil_kernels.training.loss_fields import LossFields

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROMISES = dict(
    re.findall(r"^\| `(dil_kernels[\w.]*)` \| (stable|provisional)", (DOCS / "stability.md").read_text(), re.MULTILINE)
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("sphinx", "furo", "myst_parser", "latex2mathml", "trl"):
        pytest.importorskip(package, reason="needs the extras [docs] and [trl]")
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-E", "-q", "-W", "--keep-going", "-d", f"{built}/doctrees"]
    result = subprocess.run([*command, "-b", "html", str(DOCS), f"{built}/html"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return built / "html"


def public_names(module: str) -> set[str]:
    """Of `__all__`, which is read: some modules need packages that are not here."""
    path = ROOT / module.replace(".", "/")
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{module} is promised, but has no __all__")


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    described = {line.split()[0].decode() for line in zlib.decompress(inventory).splitlines()}
    own = {"dil_kernels.losses": public_names("dil_kernels")}  # described once, with the functions
    for module in PROMISES:
        names = {f"{module}.{name}" for name in public_names(module) - own.get(module, set())}
        assert names <= described


def test_options_are_described_with_their_defaults(site: Path) -> None:
    text = re.sub("<[^>]+>", "", (site / "reference" / "trainer.html").read_text(encoding="utf-8"))
    for field in dataclasses.fields(LossFields):
        assert f"{field.name} \N{EN DASH} {field.metadata['help'][:20]}" in html.unescape(text), field.name
    commands = re.sub("<[^>]+>", "", (site / "reference" / "commands.html").read_text(encoding="utf-8"))
    assert all(f"--{option}" in commands for option in ("lora-rank INT", "train-file FILE", "stash-bytes INT"))


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"((?:https?:)?//[^\"]*)", text)
        assert not fetched, page.name
    assert not re.search(r"url\(\"?(?:https?:)?//", "".join(css.read_text() for css in site.rglob("*.css")))


def test_formulas_are_drawn(site: Path) -> None:
    text = (site / "losses.html").read_text(encoding="utf-8")
    assert text.count("<math") > 80
    assert "$" not in re.sub(r"<(script|style|code|pre).*?</\1>", "", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def site_links():
    spec = importlib.util.spec_from_file_location("site_links", DOCS / "site_links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_where_links_lead(site_links) -> None:
    def lead(text: str, page: str, repository: str = "") -> str:
        return site_links.relocated(text, DOCS / page, repository)

    assert lead("[a](../CHANGELOG.md#x) [b](kernels.md#y) [c](#z)", "training.md") == (
        "[a](changelog.md#x) [b](kernels.md#y) [c](#z)"
    )
    assert lead("[a](docs/kernels.md) ![b](docs/quickstart.png)", "index.md") == "[a](kernels.md) ![b](quickstart.png)"
    assert lead("[a](../../CHANGELOG.md)", "reference/data.md") == "[a](../changelog.md)"
    link = "[a](../setup.py) ![b](../experiments/results/stability.png)"
    assert lead(link, "install.md") == link
    assert lead(link, "install.md", "https://example.org/r") == link.replace(
        "../s", "https://example.org/r/blob/main/s"
    )
    with pytest.raises(FileNotFoundError, match=r"docs/install.md links to ../nowhere.md, which is no file"):
        lead("[a](../nowhere.md)", "install.md")


def test_what_is_promised_is_what_documents_import() -> None:
    documents = [ROOT / "README.md", *DOCS.rglob("*.md"), *ROOT.glob("examples/*.py")]
    for document in documents:
        for module, names in re.findall(
            r"^ *from (dil_kernels[\w.]*) import ([\w, ]+)", document.read_text(encoding="utf-8"), re.MULTILINE
        ):
            if module == "dil_kernels.quickstart.embedded":  # the examples' own data
                continue
            assert module in PROMISES, f"{document.name} imports from {module}"
            imported = {name.split()[0] for name in names.split(",")}
            assert imported <= public_names(module), f"{document.name} imports {imported} from {module}"


def test_the_version_stands_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", dil_kernels.__version__)
    assert importlib.metadata.version("dil-kernels") == dil_kernels.__version__
    for name in ("pyproject.toml", "setup.py", "CITATION.cff", "docs/conf.py"):
        assert dil_kernels.__version__ not in (ROOT / name).read_text(encoding="utf-8"), name


def test_the_changelog_is_in_the_form_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", version) for version in versions[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds
