"""How the command line spells the names of options."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable


def option_string(name: str) -> str:
    """The option of a field: ``--max-steps`` of ``max_steps``."""
    return "--" + name.replace("_", "-")


def as_on_command_line(message: str, fields: Iterable[str]) -> str:
    """A message on one line that names options as the command line does: ``--max-length none`` for ``max_length=None``.

    Args:
        message: of an error, written for callers from Python.
        fields: the names of the options; without a value beside them, only those of several words, or followed by
            "must", are taken for one.
    """
    names = "|".join(sorted(map(re.escape, fields), key=len, reverse=True))
    # Neither in paths nor in quotes nor in a longer name.
    marks, values = r"`(?:args\.)?|--|args\.", r"'[^']*'|[^\s,;:()`]+"
    named = re.compile(rf"(?<![\w./'\"-])({marks})?({names})(?:=({values}))?(`)?(?![\w/'\"=]|[.-]\w)")

    def spell(match: re.Match[str]) -> str:
        mark, name, value, _ = match.groups()
        if value is not None:
            plain = value.strip("'")
            return f"{option_string(name)} {plain.lower() if plain in ('None', 'True', 'False') else plain}"
        subject = match.string.startswith(" must ", match.end())
        return option_string(name) if mark or "_" in name or subject else match[0]

    return named.sub(spell, " ".join(message.split()))


def help_width() -> int:
    """Columns of the help: those of the terminal, 120 at most."""
    return min(shutil.get_terminal_size((120, 24)).columns, 120)
