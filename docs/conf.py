"""The documentation site: `make docs` builds it from the pages of this folder, strictly, into build/docs.

Pages read on GitHub as they are. A page that is one line, `{include} PATH`, stands for a file elsewhere in the repository.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import dil_kernels
from dil_kernels.cli.arguments import build_parser

sys.path.insert(0, str(Path(__file__).parent))
from site_links import DOCS, INCLUDED, ROOT, text_of

sys.path.insert(0, str(ROOT / "tests" / "stand_ins"))  # other trainers, of whose classes some of ours are

project = "dil_kernels"
author = copyright = "dil_kernels contributors"
version = release = dil_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"dil_kernels {version}"
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 4
highlight_language = "text"  # where a block names none
default_role = "code"  # docstrings are in Markdown's manner
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the text says types and shapes
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
smartquotes_action = "D"  # dashes alone
linkcheck_timeout = 20


def read_page(app: Sphinx, name: str, text: list[str]) -> None:
    """The text of a page as it stands on the site."""
    page = DOCS / f"{name}.md"
    if page.name in INCLUDED:
        app.env.note_dependency(ROOT / INCLUDED[page.name])
    text[0] = text_of(page).replace("```{help} dil-train\n```", options_of_command())


def options_of_command() -> str:
    """The options of `dil-train`, as its `--help` has them."""
    lines = []
    for group in build_parser()._action_groups:
        lines += [f"### {escaped(str(group.title)).capitalize()}", ""] if group._group_actions else []
        for action in group._group_actions:
            value = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else "")
            text = (action.help or "").replace("%%", "%")
            lines += [f"`{', '.join(action.option_strings)} {value}`".replace(" `", "`"), f": {escaped(text)}", ""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """A text of `--help` in Markdown: code and links in it as they are, and options as code."""
    pieces = re.split(r"(`[^`]+`|\[[^\]]+\]\(https?:[^)\s]+\)|--[\w-]+)", " ".join(text.split()))
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            pieces[i] = re.sub(r"([*_<\[\]$`~\\])", r"\\\1", piece)
        elif piece.startswith("--"):
            pieces[i] = f"`{piece}`"
    return "".join(pieces)


def say_options(app: Sphinx, what: str, name: str, subject: Any, options: Any, lines: list[str]) -> None:
    """A class of options says each of its own, with the text that `--help` has."""
    if what != "class" or not dataclasses.is_dataclass(subject):
        return
    classes = [kind for kind in subject.__mro__ if kind.__module__.startswith("dil_kernels")]
    own = {option for kind in classes for option in inspect.get_annotations(kind)}
    said = []
    for field in dataclasses.fields(subject):
        if field.name in own and "help" in field.metadata:
            made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if made else field.default
            said.append(f":param {field.name}: {' '.join(field.metadata['help'].split())} Default: ``{default!r}``.")
    place = next((i for i, line in enumerate(lines) if line.startswith(":raises")), len(lines))
    lines[place:place] = said


def shorten(app: Sphinx, what: str, name: str, subject: Any, options: Any, signature: str, returned: str) -> Any:
    """The options of transformers and TRL are theirs to list."""
    return ("(output_dir, **options)", returned) if what == "class" and len(signature or "") > 2000 else None


def keep_blocks(app: Sphinx, what: str, name: str, subject: Any, options: Any, lines: list[str]) -> None:
    """What is indented after a blank line in a docstring is code; that a field has a number says nothing."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()

    def indent(line: str) -> int:
        return len(line) - len(line.lstrip())

    for i in reversed(range(len(lines) - 2)):
        before, blank, after = lines[i : i + 3]
        if before.strip() and not blank.strip() and after.strip() and indent(after) > indent(before):
            lines[i + 1 : i + 1] = ["", " " * indent(before) + "::"]


def mathml(self: Any, node: nodes.Element) -> None:
    """Math without a script: browsers have MathML."""
    block = isinstance(node, nodes.math_block)
    text = convert(node.astext(), display="block" if block else "inline")
    # Few fonts have a prime of the size of an exponent.
    self.body.append(
        re.sub(r"<msup>(<mi>\w</mi>)<mi>(&#x02032;)</mi></msup>", r'\1<mo lspace="0" rspace="0">\2</mo>', text)
    )
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.add_html_math_renderer("mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None))
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", keep_blocks, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", say_options)
    app.connect("autodoc-process-signature", shorten)
