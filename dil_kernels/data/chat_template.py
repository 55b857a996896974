"""Conversations to text through a tokenizer's chat template; what the template would leave out is refused."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dil_kernels.data.columns import response_columns
from dil_kernels.data.markers import (
    REASONING_KEYS,
    RENDERING_ERRORS,
    Form,
    MarkedConversation,
    MarkedTools,
    Piece,
    Shape,
    probe,
)
from dil_kernels.data.messages import CONTINUE, TEMPLATE_OPTIONS, TOOLS, Message, Messages, PreferenceDataError
from dil_kernels.data.pairs import Pair

SHAPES_KEPT = 4096
START_OF_REASONING, END_OF_REASONING = "<think>", "</think>"


@dataclass(frozen=True)
class _Conversation:
    """A prompt with one of its responses.

    Attributes:
        messages: of both; where the prompt is continued, its last message is one with the first of the response.
        prompt_size: how many of them are the prompt's alone.
        where, column: the place of the response.
    """

    messages: Messages
    prompt_size: int
    where: str
    column: str

    def may_lose_reasoning(self, index: int) -> bool:
        """Whether a message is the assistant's and the prompt's, of which generation leaves the reasoning out, too."""
        return index < self.prompt_size and self.messages[index]["role"] == "assistant"

    def place(self, index: int) -> str:
        """Where a message stands in the data."""
        in_prompt = index < self.prompt_size
        column, number = ("prompt", index + 1) if in_prompt else (self.column, index - self.prompt_size + 1)
        return f"{self.where}, column {column!r}, message {number}"


class ChatRenderer:
    """Conversations as text.

    The first conversation of each shape (roles, keys, calls, tools, options) is also rendered with markers in place of
    its texts, which shows what the template leaves out. Every content and reasoning is looked for in what is rendered.

    Args:
        tokenizer: of transformers, with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._shapes: dict[tuple[str, str], Shape] = {}
        self.notes: dict[str, str] = {}  # what is to be said, by what the template leaves out; of its first row alone

    def render(self, pair: Pair, where: str) -> tuple[str, dict[str, str]]:
        """The text of the prompt, up to where the response begins, and of the whole conversation with each response.

        Raises:
            PreferenceDataError: the template refuses the conversation, leaves out or changes a text of it, or renders
                the prompt alone differently from the prompt within the conversation; or it is not known whether a
                prompt that ends with the assistant's message is continued.
        """
        options = dict(pair.get(TEMPLATE_OPTIONS, {}))
        continued = _is_continued(pair["prompt"], options.pop(CONTINUE, None), where)
        ending = {CONTINUE: True} if continued else {"add_generation_prompt": True}
        if TOOLS in pair:
            options[TOOLS] = pair[TOOLS]
        if getattr(self._tokenizer, "chat_template", None) is None and "chat_template" not in options:
            raise PreferenceDataError(
                f"{where}: these are messages, and the tokenizer has no chat template to make text of them: give it "
                "one (chat_template_path), or prompts and responses that are strings"
            )
        texts: dict[str, str] = {}
        prompts: dict[Form, str] = {}
        try:
            template = self._tokenizer.get_chat_template(options.get("chat_template"), pair.get(TOOLS))
            for name in options:
                if name not in (TOOLS, "chat_template") and not _names(template, name):
                    self._note(f"{where}, column {TEMPLATE_OPTIONS!r}", f"the option {name!r}")
            prompt = _with_reasoning(pair["prompt"], template)
            for column in response_columns(pair):
                response = _with_reasoning(pair[column], template)
                conversation = _join(prompt, response, continued, template, where, column)
                shape = self._shape(conversation.messages, options, template)
                self._check_shape(shape, conversation)
                texts[column] = self._apply(shape.form.of(conversation.messages), **options)
                self._check_kept(texts[column], shape, conversation)
                if shape.form not in prompts:
                    prompts[shape.form] = self._apply(shape.form.of(prompt), **options, **ending)
        except PreferenceDataError:
            raise
        except RENDERING_ERRORS as error:
            raise PreferenceDataError(f"{where}: the chat template refuses this conversation: {error}") from error
        start = next(iter(prompts.values()))
        for column, text in texts.items():
            if not text.startswith(start):
                raise PreferenceDataError(
                    f"{where}, column {column!r}: the template renders the prompt alone, ending with {start[-40:]!r}, "
                    "differently from the prompt within the conversation: which tokens are the response is not known "
                    "(an option of the template may help: a column chat_template_kwargs, such as "
                    "{'enable_thinking': false})"
                )
        return start, texts

    def _apply(self, messages: Messages, **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _shape(self, messages: Messages, options: Mapping[str, Any], template: str) -> Shape:
        marked = MarkedConversation(messages)
        others = {name: value for name, value in options.items() if name != TOOLS}
        tools = MarkedTools(options.get(TOOLS, []))
        key = template, repr((marked.messages, others, tools.tools))
        if key not in self._shapes:
            if len(self._shapes) == SHAPES_KEPT:
                self._shapes.clear()
            shape = probe(marked, others, tools, self._apply)
            # A tool without a name shows nothing.
            left_out = shape.tools_left_out or (TOOLS in options and not _names(template, TOOLS))
            self._shapes[key] = shape._replace(tools_left_out=left_out)
        return self._shapes[key]

    def _check_shape(self, shape: Shape, conversation: _Conversation) -> None:
        """Refuse what the template leaves out; only reasoning of a prompt may be, as generation leaves it out too."""
        if shape.tools_left_out:
            raise PreferenceDataError(
                f"{conversation.where}, column {TOOLS!r}: the chat template has no place for tools"
            )
        for is_left_out, what in (
            (shape.parameters_left_out, "a parameter"),
            (shape.descriptions_left_out, "a description"),
        ):
            if is_left_out:
                self._note(f"{conversation.where}, column {TOOLS!r}", what)
        left_out = shape.left_out - shape.by_option
        for piece in sorted(left_out, key=lambda piece: (piece.message, piece.key != "tool_calls", piece.key)):
            place = conversation.place(piece.message)
            if piece.message >= conversation.prompt_size or piece.key not in REASONING_KEYS:
                raise PreferenceDataError(f"{place}: the chat template has no place for {piece.key}")
            self._note(place, piece.key)

    def _check_kept(self, text: str, shape: Shape, conversation: _Conversation) -> None:
        """Refuse a content or reasoning of which the template leaves out or changes a part.

        A text that stands in several pieces must be there as often: each is looked for in its own right.
        """
        pieces = _pieces(conversation.messages, shape.left_out)
        missed = _missed(pieces, text)
        if missed is None:
            return
        kept = {piece: value for piece, value in pieces.items() if value in text}
        said = {
            piece: _after_reasoning(value) if conversation.may_lose_reasoning(piece.message) else value
            for piece, value in pieces.items()
        }
        for piece, value in pieces.items():
            if piece in kept:
                wanted = sum(other.count(value) for other in kept.values())
                if wanted == 1 or text.count(value) >= wanted:
                    continue
                lost = text.count(value) < sum(said[other].count(value) for other in kept)
                if not lost and said[piece] == value:
                    continue
            elif _is_kept(value, text):
                continue
            else:
                lost = said[piece] == value or not _is_kept(said[piece], text)
            if lost:
                blamed = missed if pieces[missed] == value else piece
                raise PreferenceDataError(
                    f"{conversation.place(blamed.message)}: the chat template leaves out or changes a part of its "
                    f"{blamed.key}"
                )
            self._note(
                conversation.place(piece.message), f"the reasoning in its content, all before {END_OF_REASONING}"
            )

    def _note(self, place: str, what: str) -> None:
        self.notes.setdefault(
            what,
            f"{place}: the chat template leaves out {what}, in training as in generation; this is said of the first "
            "such row alone",
        )


def _is_continued(prompt: Messages, option: bool | None, where: str) -> bool:
    """Whether the response goes on with the last message of the prompt, which is the assistant's."""
    role = prompt[-1]["role"]
    if role != "assistant" and option:
        raise PreferenceDataError(f"{where}: {CONTINUE} is true, but the last message of the prompt is {role!r}")
    if role == "assistant" and option is None:
        raise PreferenceDataError(
            f"{where}, column 'prompt': the last message is the assistant's: say in a column {TEMPLATE_OPTIONS} "
            f"whether the response continues it ({{{CONTINUE!r}: true}}) or is a message of its own "
            f"({{{CONTINUE!r}: false}})"
        )
    return bool(option)


def _join(
    prompt: Messages, response: Messages, continued: bool, template: str, where: str, column: str
) -> _Conversation:
    if not continued:
        return _Conversation([*prompt, *response], len(prompt), where, column)
    last, first = prompt[-1], response[0]
    texts = [key for key in last.keys() - {"role", "content"} if isinstance(last[key], str) and last[key].strip()]
    lost = ["tool_calls"] if last.get("tool_calls") else []
    lost += [key for key in sorted(texts) if first.get(key, last[key]) != last[key] and _names(template, key)]
    if lost:
        raise PreferenceDataError(
            f"{where}, column 'prompt': the last message has {lost[0]}: the response in column {column!r}, which "
            "continues it, cannot come before or take its place"
        )
    whole = {**last, **first, "content": (last["content"] or "") + (first["content"] or "")}
    return _Conversation([*prompt[:-1], whole, *response[1:]], len(prompt) - 1, where, column)


def _pieces(messages: Messages, left_out: Collection[Piece]) -> dict[Piece, str]:
    """The contents and reasonings of messages, without blanks around them; one that stands under two keys, once."""
    pieces: dict[Piece, str] = {}
    for index, message in enumerate(messages):
        values: set[str] = set()
        for key in ("content", *REASONING_KEYS):
            value = message.get(key)
            if not isinstance(value, str) or not value.strip() or (key != "content" and value in values):
                continue
            if key != "content":
                values.add(value)
            if Piece(index, key) not in left_out:
                pieces[Piece(index, key)] = value.strip()
    return pieces


def _missed(pieces: Mapping[Piece, str], text: str) -> Piece | None:
    """The first piece that does not stand in a text after the end of the one before; None if there is none."""
    end = 0
    for piece, value in pieces.items():
        start = text.find(value, end)
        if start < 0:
            return piece
        end = start + len(value)
    return None


def _after_reasoning(content: str) -> str:
    """What a content says after its reasoning; all of it, if it does not begin with any."""
    head, end, said = content.rpartition(END_OF_REASONING)
    before = head[: max(head.find(START_OF_REASONING), 0)]  # a template may have written the start
    return content if not end or before.strip() else said


def _with_reasoning(messages: Messages, template: str) -> Messages:
    """The messages, with reasoning under the names that the template reads."""
    keys = [key for key in REASONING_KEYS if _names(template, key)]

    def read(message: Message) -> Message:
        reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
        return message if reasoning is None else {**dict.fromkeys(keys, reasoning), **message}

    return [read(message) for message in messages]


def _is_kept(value: str, text: str) -> bool:
    """Whether a text has all of a value: blanks may differ, and JSON may quote it."""
    quoted = (json.dumps(value, ensure_ascii=escaped)[1:-1] for escaped in (False, True))
    return any(form in text for form in quoted) or "".join(value.split()) in "".join(text.split())


@functools.lru_cache(maxsize=64)
def _names(template: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", template) is not None
