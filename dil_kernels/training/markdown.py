"""Text of others in Markdown: it is shown as it is, and is neither markup nor HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_MARKUP = re.compile(r"([\\`*_{}\[\]#!|~$])")
_LINES = re.compile(r"[\r\n]+")
_BARE_PIPE = re.compile(r"(?<!\\)\|")
_INDENT = re.compile(r"^(?=\t| {4})\s")  # of a block of code
_START_OF_BLOCK = re.compile(r"^(\s*\d*)([-+=.)])")


def escaped(text: str) -> str:
    """A text within a line, in which no link, image, emphasis, tag, formula, cell or block begins; breaks are kept."""
    text = _MARKUP.sub(r"\\\1", html.escape(text, quote=False))
    text = _INDENT.sub("&nbsp;", _START_OF_BLOCK.sub(r"\1\\\2", text))
    return re.sub(r"\r\n|\r|\n", "<br>", text)


def code(text: str) -> str:
    """A code span, also of a text that has backticks or lines. In a table escape its pipes, too."""
    fence = "`" * (_longest_run(text) + 1)
    blank = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return fence + blank + _LINES.sub(" ", text) + blank + fence


def fenced(text: str, language: str = "") -> str:
    """A block of code, which no line of the text ends."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return "\n".join([fence + language, text.rstrip("\n"), fence])


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, whose first row is the head; a cell has neither lines nor bare pipes."""
    cells = [[_LINES.sub(" ", _BARE_PIPE.sub(r"\\|", cell)) for cell in row] for row in rows]
    head, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _longest_run(text: str) -> int:
    return max(map(len, re.findall(r"`+", text)), default=0)
