"""Conversations whose texts are replaced by markers, which show what a chat template leaves out."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jinja2 import TemplateError

from dil_kernels.data.messages import TOOLS, Message, Messages

RENDERING_ERRORS = (TemplateError, KeyError, TypeError, ValueError)

PRINTED_ARGUMENTS = re.compile(r"\{'mark\d+end': 'mark\d+end'\}")  # which a template wants as JSON text
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # names of the same thing


class Piece(NamedTuple):
    """A text of a conversation: the key of a message, counted from 0."""

    message: int
    key: str


class MarkedConversation:
    """A conversation with a marker in each text, and so the same for every conversation of one shape.

    Roles stay, and so do numbers. Ids that tie a tool's message to its call are replaced, but may be left out: they
    say nothing. The arguments of a call become one argument. The name of a tool need not be repeated where its call has
    it.

    Attributes:
        messages: the marked ones.
        pieces: by marker.
    """

    def __init__(self, messages: Messages) -> None:
        self.pieces: dict[str, Piece] = {}
        self._ids: dict[str, str] = {}
        self._called: dict[str, str] = {}  # markers of functions, by their names
        self.messages = [self._message(index, message) for index, message in enumerate(messages)]

    def lost(self, text: str) -> list[Piece]:
        """The pieces that are not in a rendered text, each once, those of a message in the order of its keys."""
        return list(dict.fromkeys(piece for marker, piece in self.pieces.items() if marker not in text))

    def _message(self, index: int, message: dict[str, Any]) -> dict[str, Any]:
        marked: dict[str, Any] = {}
        reasoning: dict[str, str] = {}
        for key, value in message.items():
            piece = Piece(index, key)
            if key == "tool_calls":
                marked[key] = [self._call(piece, call) for call in value]
            elif key == "tool_call_id" and isinstance(value, str):
                marked[key] = self._id(value)
            elif key in REASONING_KEYS and isinstance(value, str):  # one text may stand under several of the names
                marked[key] = reasoning[value] = reasoning.get(value) or self._text(piece, value)
            elif key == "name" and message["role"] == "tool" and value in self._called:
                marked[key] = self._called[value]
            else:
                marked[key] = value if key == "role" else self._texts(piece, value)
        return marked

    def _call(self, piece: Piece, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        marked: dict[str, Any] = {}
        for key, value in call.items():
            if key == "function" and isinstance(function, dict):
                marked[key] = self._call(piece, function)
            elif key == "name" and isinstance(value, str):
                marked[key] = self._called[value] = self._text(piece, value)
            elif key == "arguments" and value:
                marked[key] = {self._text(piece, "name"): self._text(piece, "value")}
            elif key == "id" and isinstance(value, str):
                marked[key] = self._id(value)
            else:
                marked[key] = value
        return marked

    def _texts(self, piece: Piece, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(piece, value)
        if isinstance(value, dict):
            return {key: self._texts(piece, item) for key, item in value.items()}
        return [self._texts(piece, item) for item in value] if isinstance(value, list) else value

    def _text(self, piece: Piece, text: str) -> str:
        if not text.strip():
            return text
        marker = f"mark{len(self.pieces)}end"
        self.pieces[marker] = piece
        return marker

    def _id(self, value: str) -> str:
        return self._ids.setdefault(value, f"{len(self._ids):09}")  # as long as Mistral's templates want ids


class MarkedTools:
    """Tools with a marker for each name, each parameter and each description.

    Attributes:
        tools: the marked ones.
        names, parameters, descriptions: the markers.
    """

    def __init__(self, tools: list[dict[str, Any]]) -> None:
        self.names: list[str] = []
        self.parameters: list[str] = []
        self.descriptions: list[str] = []
        self.tools = [self._tool(tool) for tool in tools]

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        function = self._described(_function(tool))
        if isinstance(function.get("name"), str):
            self.names.append(f"mark{len(self.names)}tool")
            function = {**function, "name": self.names[-1]}
        schema = function.get("parameters")
        if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
            function = {**function, "parameters": self._renamed(schema)}
        return {**tool, "function": function} if "function" in tool else function

    def _renamed(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema of a tool's parameters with markers for their names."""
        start = len(self.parameters)
        markers = {name: f"mark{index}parameter" for index, name in enumerate(schema["properties"], start)}
        self.parameters += markers.values()
        renamed = {**schema, "properties": {markers[name]: item for name, item in schema["properties"].items()}}
        if isinstance(schema.get("required"), list):
            renamed["required"] = [
                markers.get(name, name) if isinstance(name, str) else name for name in schema["required"]
            ]
        return renamed

    def _described(self, schema: Any) -> Any:
        if isinstance(schema, list):
            return [self._described(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        marked = {key: self._described(item) for key, item in schema.items()}
        if isinstance(schema.get("description"), str) and schema["description"].strip():
            self.descriptions.append(f"mark{len(self.descriptions)}description")
            marked["description"] = self.descriptions[-1]
        return marked


class Form(NamedTuple):
    """How a template takes messages: arguments as JSON text, no content as an empty one, contents as lists of parts."""

    text_arguments: bool = False
    text_contents: bool = False
    parts: bool = False

    def of(self, messages: Messages) -> Messages:
        """Messages in this form."""
        if self.text_arguments:
            messages = [_with_text_arguments(message) for message in messages]
        if self.text_contents:
            messages = [{**message, "content": message["content"] or ""} for message in messages]
        if self.parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if message["content"] is not None
                else message
                for message in messages
            ]
        return messages


class Shape(NamedTuple):
    """What a template makes of all conversations of one shape."""

    form: Form
    left_out: frozenset[Piece] = frozenset()
    by_option: frozenset[Piece] = frozenset()  # those of them that are rendered without the options of the template
    tools_left_out: bool = False
    parameters_left_out: bool = False
    descriptions_left_out: bool = False  # of tools or their parameters


def probe(
    marked: MarkedConversation, options: Mapping[str, Any], tools: MarkedTools, apply: Callable[..., str]
) -> Shape:
    """Find what a template leaves out, in the form in which this is least; nothing where it refuses markers.

    Args:
        marked: the conversation.
        options: of the template, without the tools.
        tools: that it is given.
        apply: renders messages with options.
    """
    tools_option = {TOOLS: tools.tools} if tools.tools else {}
    best: tuple[list[Piece], Form, str] | None = None
    tries = [(form, False) for form in _forms(marked.messages)]
    for form, printed in tries + [(form, True) for form, _ in tries]:  # where there is no other way
        if printed and best is not None:
            break
        text = _attempt(marked, form, {**options, **tools_option}, apply, printed)
        if text is not None and (best is None or len(marked.lost(text)) < len(best[0])):
            best = marked.lost(text), form, text
            if not best[0]:
                break
    if best is None:
        return Shape(Form())
    lost, form, text = best
    by_option: frozenset[Piece] = frozenset()
    if lost and options:
        plain = _attempt(marked, form, tools_option, apply)
        by_option = frozenset(lost) - frozenset(lost if plain is None else marked.lost(plain))
    groups = tools.names, tools.parameters, tools.descriptions
    left_out = (any(marker not in text for marker in markers) for markers in groups)
    return Shape(form, frozenset(lost), by_option, *left_out)


def _forms(messages: Messages) -> list[Form]:
    has_arguments = any(
        "arguments" in _function(call) for message in messages for call in message.get("tool_calls", [])
    )
    has_none = any(message["content"] is None for message in messages)
    choices = [(False, True)[: 1 + possible] for possible in (has_arguments, has_none, True)]
    return [Form(*chosen) for chosen in itertools.product(*choices)]


def _attempt(
    marked: MarkedConversation, form: Form, options: Mapping[str, Any], apply: Callable[..., str], printed: bool = True
) -> str | None:
    """The marked conversation as text; None where the template refuses it, or writes lists of parts as they are.

    And, unless `printed`, where it writes arguments as Python does.
    """
    try:
        text = apply(form.of(marked.messages), **options)
    except RENDERING_ERRORS:
        return None
    written = form.parts and any(opening in text for opening in ("'text': 'mark", '"text": "mark'))
    return None if written or (PRINTED_ARGUMENTS.search(text) and not printed) else text


def _function(call: Mapping[str, Any]) -> dict[str, Any]:
    """Where a call has its name and arguments: in its function, or in itself."""
    function = call.get("function")
    return function if isinstance(function, dict) else dict(call)


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = _function(call)
        if "arguments" in function:
            function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}
