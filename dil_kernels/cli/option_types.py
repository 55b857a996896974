"""The fields of classes as options: what `argparse` needs to read the value of one, from its type.

`transformers.HfArgumentParser` reads fields alike, but no null and no JSON object, of a list beside another type one
entry, and it fills in defaults, behind which a recipe could not be told from what was not given.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dil_kernels.data.json_text import parse_json

KEYWORDS = ("choices", "const", "metavar", "nargs", "type")  # of `add_argument`, in metadata of fields
MAX_LISTED = 4  # choices that --help lists


@dataclasses.dataclass(frozen=True)
class OptionField:
    """A field that is an option.

    Attributes:
        name: of the field.
        hint: its resolved type.
        default: its default.
        help: what its class says of it, on one line.
        keywords: of `add_argument`, beside those that the type asks for.
    """

    name: str
    hint: Any
    default: Any
    help: str = ""
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def fields_of(kind: Any) -> dict[str, OptionField]:
    """The fields of a dataclass by name, with the help and the KEYWORDS in their metadata."""
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        text = " ".join(str(field.metadata.get("help", "")).split())
        keywords = {name: value for name, value in field.metadata.items() if name in KEYWORDS}
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = OptionField(field.name, hints[field.name], default, text, keywords)
    return found


def members_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of another type it alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def type_options(hint: Any, choices: Sequence[str] | None = None) -> dict[str, Any]:
    """The keywords of `add_argument` for a field.

    Args:
        hint: its resolved type.
        choices: all of its values, where they are known beside the type.
    """
    members = members_of(hint)
    optional = type(None) in members
    lists = [member for member in members if typing.get_origin(member) in (list, tuple)]
    for kind in (*members, *(kind for each in lists for kind in typing.get_args(each))):
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            choices = tuple(choice.value for choice in kind)
    if lists:
        return {"nargs": "+", "metavar": "NAME", **({} if choices is None else {"choices": choices})}
    if choices is not None:
        return {"choices": choices} if len(choices) <= MAX_LISTED else {"choices": choices, "metavar": "NAME"}
    if any(dict in (member, typing.get_origin(member)) for member in members):
        return {"type": json_or_file if str in members else json_object, "metavar": "JSON"}
    if str in members:
        return {"metavar": "TEXT"}
    if bool in members:
        return {"type": _or_none(boolean, optional), "nargs": "?", "const": True, "metavar": "BOOL"}
    for kind, metavar in ((int, "INT"), (float, "FLOAT")):
        if kind in members:
            return {"type": _or_none(kind, optional), "metavar": metavar}
    return {"type": json_object, "metavar": "JSON"}


def _or_none(convert: Callable[[str], Any], optional: bool) -> Callable[[str], Any]:
    if not optional:
        return convert

    def convert_or_none(value: str) -> Any:
        return None if value.lower() == "none" else convert(value)

    convert_or_none.__name__ = convert.__name__
    return convert_or_none


def nonempty(value: str) -> str:
    """A value that is not empty, as that of a shell variable that is not set would be."""
    if not value.strip():
        raise argparse.ArgumentTypeError("the value is empty")
    return value


def boolean(value: str) -> bool:
    """True or false, by any of their usual names."""
    found = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(value.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"expected true or false, got {value!r}")
    return found


def json_object(value: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = parse_json(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {value!r:.80} ({error})") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {value!r:.80}")
    return found


def json_or_file(value: str) -> dict[str, Any] | str:
    """A JSON object, or the path of a file of one."""
    if not os.path.isfile(value):  # nor is a text that is too long for a path
        return json_object(value)
    try:
        json_object(Path(value).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{value} is no file of a JSON object") from error
    return value


def checkpoint(value: str) -> str | bool:
    """The path of a checkpoint, or whether to resume from the last one."""
    return value.lower() == "true" if value.lower() in ("true", "false") else nonempty(value)
