"""JSON as users write it, read without losing a part of it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_OBJECTS = re.compile(r"""\s*\[\s*\{\s*["']""")  # the start of a list of objects, as JSON or as Python prints it
_KEYS_OF_MESSAGES = (("role", "content"), ("role", "tool_calls"), ("from", "value"))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; bytes are UTF-8.

    Raises:
        ValueError: it is no JSON (`json.JSONDecodeError`, `UnicodeDecodeError`), or holds what would be lost or cannot
            be read: a key that stands twice in an object, a number of too many digits or out of the range of a double,
            nesting that is too deep.
    """
    if isinstance(text, bytes):
        encoding = json.detect_encoding(text)
        if encoding.startswith(("utf-16", "utf-32")):
            raise ValueError(f"expected UTF-8, got {encoding[:6].upper()}")
        text = text.decode(encoding, "surrogatepass")
    elif text.startswith("\ufeff"):
        raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("objects or lists are nested too deeply") from None


def looks_like_messages(text: str) -> bool:
    """Whether a text is a list of messages that was made into text, or such a list that cannot be read.

    Lists of other objects are not, nor is a list with more text behind it: answers and questions may be of such.
    """
    if _OBJECTS.match(text) is None:
        return False
    try:
        named = parse_json(text)[0].keys()
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":
            return False
        named = set(re.findall(r"""["'](\w+)["']\s*:""", text))
    return any(named >= {*keys} for keys in _KEYS_OF_MESSAGES)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object, and only one value would be read")
    return found


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ValueError(f"a number of {len(digits):,} digits ({digits[:12]}...) cannot be read") from None


def _fraction(digits: str) -> float:
    number = float(digits)
    if math.isinf(number) or (not number and re.match(r"-?[0.]*[1-9]", digits)):
        raise ValueError(f"the number {digits:.40} is too {'small' if not number else 'large'} to be read")
    return number


# `json.loads` makes one at every call.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_fraction)
