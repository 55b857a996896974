"""Text of others in Markdown: it is shown as it is, and is neither markup nor HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_MARKUP = re.compile(r"([\\`*_{}\[\]#!|~$])")
_LINES = re.compile(r"[\r\n]+")
_BARE_PIPE = re.compile(r"(?<!\\)\|")
_EDGES = re.compile(r"^\s|\s$")  # an indent is that of a block of code; others are cut off
_START_OF_BLOCK = re.compile(r"^(\s*\d*)([-+=.)])")
# Where GitHub, and viewers that find more, make links of plain text: addresses, domains, mail, names of users.
_LINKS = re.compile(r"@|www(?=\.)|/(?=/)|(?<=\w)\.(?=[^\W\d_]{2})", re.IGNORECASE)
_APART = r"\g<0><!-- -->"
# Control characters but for tabs and ends of lines, and those that turn the direction of the text around them.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """A text within a line, in which no link, image, emphasis, tag, formula, cell or block begins; breaks are kept."""
    text = _LINKS.sub(_APART, html.escape(_MARKUP.sub(r"\\\1", visible(text)), quote=False))
    text = re.sub(r"\r\n|\r|\n", "<br>", _START_OF_BLOCK.sub(r"\1\\\2", text))
    return _EDGES.sub(lambda blank: f"&#{ord(blank[0])};", text)


def visible(text: str) -> str:
    """A text in which characters that move a cursor or turn the direction of text stand as escapes of Python."""
    return _UNSEEN.sub(lambda unseen: repr(unseen[0])[1:-1], text)


def code(text: str) -> str:
    """A code span, also of a text that has backticks or lines. In a table escape its pipes, too."""
    text = _LINES.sub(" ", visible(text))
    fence = "`" * (_longest_run(text) + 1)
    blank = " " if "`" in (text[:1], text[-1:]) or text[:1] == text[-1:] == " " else ""
    return fence + blank + text + blank + fence


def fenced(text: str, language: str = "") -> str:
    """A block of code, which no line of the text ends."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return "\n".join([fence + language, visible(text).rstrip("\n"), fence])


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, whose first row is the head; a cell has neither lines nor bare pipes."""
    cells = [[_LINES.sub(" ", _BARE_PIPE.sub(r"\\|", cell)) for cell in row] for row in rows]
    head, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _longest_run(text: str) -> int:
    return max(map(len, re.findall(r"`+", text)), default=0)
