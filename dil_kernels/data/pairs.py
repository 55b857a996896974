"""One preference pair, or one labelled response: checked, and brought into one of the two forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dil_kernels.data.columns import COLUMNS, RESPONSES, holds_value, media_error, response_columns
from dil_kernels.data.messages import (
    JSON_COLUMNS,
    MEDIA,
    Messages,
    NoPromptError,
    PreferenceDataError,
    check_json_columns,
    check_messages,
    check_unicode,
    messages_of_text,
    plain_messages,
    split_conversations,
    split_strings,
)
from dil_kernels.data.token_columns import GIVEN_REFERENCE, REF_COLUMNS, UNPAIRED_REF_COLUMNS

PLAIN_COLUMNS = frozenset(COLUMNS)
LARGEST_NUMBER = (2 - 2**-23) * 2.0**127  # of float32
LARGEST_LOG_PROB = 1e-3  # of a response, by rounding
NOT_PLAIN = frozenset({*MEDIA, *JSON_COLUMNS, *GIVEN_REFERENCE, "completion", "label"})

Pair = dict[str, Any]  # prompt, chosen, rejected: strings, or lists of messages; or prompt, completion, label


class Like(NamedTuple):
    """The first pair of some data, as which the others must be.

    Attributes:
        pair: checked.
        has_prompt: whether it came with a prompt, or with responses that begin with it.
    """

    pair: Pair
    has_prompt: bool

    @classmethod
    def of(cls, record: Any, where: str) -> Like:
        """Check a record, see `check_pair`."""
        pair = check_pair(record, where)
        return cls(pair, record.get("prompt") is not None)


def is_conversational(pair: Pair) -> bool:
    """Whether a checked pair is lists of messages rather than strings."""
    return not isinstance(pair["prompt"], str)


def check_pair(record: Any, where: str, like: Like | None = None) -> Pair:
    """Check one pair, or one labelled response, and bring it into one of the two forms.

    Args:
        record: what stood in the data.
        where: its place, for the message.
        like: the first of the same data, whose form this one must have.

    Returns:
        prompt, chosen and rejected, or prompt, completion and label: strings, or lists of messages.

    Raises:
        PreferenceDataError: the record is broken.
    """
    if like is not None and (plain := _plain_pair(record, like.pair)) is not None:
        return plain
    if not isinstance(record, Mapping):
        raise PreferenceDataError(f"{where}: expected an object with {', '.join(COLUMNS)}, got {type(record).__name__}")
    for name in MEDIA & record.keys():
        if holds_value(record[name]):
            raise media_error(name, f"{where}, ")
    columns = response_columns({name: value for name, value in record.items() if value is not None})
    for column in columns:
        _require(record, column, where)
    record = {**record, **messages_of_text({name: record.get(name) for name in ("prompt", *columns)}, where)}
    is_text = any(isinstance(record[column], str) for column in columns)
    _check_kinds(record, where, columns)
    try:
        pair = (_check_strings if is_text else _check_conversation)(record, where, columns)
        options = check_json_columns(record, where)
    except NoPromptError as error:
        found = [name for name, value in record.items() if value is not None]
        if set(found) <= {*columns}:
            raise
        raise PreferenceDataError(f"{error} (columns with a value: {', '.join(found)})") from None
    except RecursionError:
        raise PreferenceDataError(f"{where}: objects or lists are nested too deeply") from None
    if columns == ("completion",):
        pair["label"] = _check_label(record, where)
    given = REF_COLUMNS if columns == RESPONSES else UNPAIRED_REF_COLUMNS
    pair |= {name: _check_number(record[name], where, name) for name in given if record.get(name) is not None}
    if like is not None:
        check_form(pair, like.pair, where)
        if is_text and like.has_prompt != (record.get("prompt") is not None):
            has = ("no prompt", "a prompt")
            raise PreferenceDataError(
                f"{where}: this pair has {has[not like.has_prompt]}, but those before it have {has[like.has_prompt]}: "
                "what chosen and rejected share is taken for the prompt only where no pair has one of its own"
            )
    if is_text and options:
        raise PreferenceDataError(
            f"{where}, column {next(iter(options))!r}: only conversations go through a chat template, but these are "
            "strings"
        )
    return pair | options


def _plain_pair(record: Any, like: Pair) -> Pair | None:
    """A pair of three lists of plain messages, which most are; None where it must be looked at more closely.

    Nothing is formatted for it that only a message would say.
    """
    if type(record) is not dict or not NOT_PLAIN.isdisjoint(record):
        return None
    if like.keys() != PLAIN_COLUMNS or not is_conversational(like):
        return None
    pair = {}
    for column in COLUMNS:
        messages = plain_messages(record.get(column))
        if messages is None:
            return None
        if column != "prompt":
            last = messages[-1]
            if messages[0]["role"] != "assistant" or last["role"] != "assistant" or not last["content"].strip():
                return None
        pair[column] = messages
    return pair


def _check_kinds(record: Mapping[str, Any], where: str, columns: tuple[str, ...]) -> None:
    """Refuse a list beside a string, and name the one that differs from the others."""
    given = {name: type(record[name]) for name in ("prompt", *columns) if isinstance(record.get(name), (str, list))}
    lists = [name for name, kind in given.items() if kind is list]
    strings = [name for name in given if name not in lists]
    if not lists or not strings or strings == ["prompt"]:
        return
    if len(lists) >= len(strings):
        raise PreferenceDataError(
            f"{where}, column {strings[-1]!r}: expected a list of messages, as in {lists[0]!r}, got str"
        )
    raise PreferenceDataError(f"{where}, column {lists[0]!r}: expected a string, got list")


def check_form(pair: Pair, like: Pair, where: str) -> None:
    """Refuse a pair that has other columns, or another kind of columns, than one before it.

    Args:
        pair: checked; it may be a row of a data set of such.
        like: likewise.
        where: the place of `pair`.

    Raises:
        PreferenceDataError: names both kinds.
    """
    forms = [[name for name in form if name not in JSON_COLUMNS] for form in (pair, like)]
    if {*forms[0]} != {*forms[1]}:
        names = (", ".join(form) for form in forms)
        raise PreferenceDataError("{}: this record has {}, but those before it have {}".format(where, *names))
    if is_conversational(like) != is_conversational(pair):
        what, strings = ("response", "strings") if "completion" in pair else ("pair", "three strings")
        kinds = (strings, "lists of messages")
        raise PreferenceDataError(
            f"{where}: this {what} is {kinds[is_conversational(pair)]}, but those before it are "
            f"{kinds[is_conversational(like)]}"
        )


def _check_label(record: Mapping[str, Any], where: str) -> bool:
    _require(record, "label", where)
    if not isinstance(record["label"], bool):
        kind = type(record["label"]).__name__
        raise PreferenceDataError(f"{where}, column 'label': expected true or false, got {kind}")
    return record["label"]


def _check_number(value: Any, where: str, column: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:  # an integer
        number = math.inf
    if not math.isfinite(number):
        raise PreferenceDataError(
            f"{where}, column {column!r}: expected a number, the sum of log-probs, got {value!r:.40}"
        )
    if abs(number) > LARGEST_NUMBER:
        raise PreferenceDataError(f"{where}, column {column!r}: {number!r} is beyond the range of float32")
    if number > LARGEST_LOG_PROB:
        raise PreferenceDataError(f"{where}, column {column!r}: a sum of log-probs is at most 0, got {number!r}")
    return number


def _require(record: Mapping[str, Any], column: str, where: str) -> None:
    if record.get(column) is None:
        found = ", ".join(name for name, value in record.items() if value is not None) or "none"
        raise PreferenceDataError(f"{where}: column {column!r} is missing (columns with a value: {found})")


def _check_text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise PreferenceDataError(f"{where}, column {column!r}: expected a string, got {type(value).__name__}")
    check_unicode(value, f"{where}, column {column!r}")
    if column != "prompt":
        _check_filled(value, where, column)
    return value


def _check_filled(response: str, where: str, column: str) -> None:
    if not response.strip():
        raise PreferenceDataError(f"{where}, column {column!r}: the response is empty")


def _check_strings(record: Mapping[str, Any], where: str, columns: tuple[str, ...]) -> Pair:
    texts = {column: _check_text(record[column], where, column) for column in columns}
    if record.get("prompt") is None and columns == RESPONSES:
        return dict(zip(COLUMNS, split_strings(texts["chosen"], texts["rejected"], where), strict=True))
    _require(record, "prompt", where)
    return {"prompt": _check_text(record["prompt"], where, "prompt"), **texts}


def _check_conversation(record: Mapping[str, Any], where: str, columns: tuple[str, ...]) -> Pair:
    prompt = record.get("prompt")
    responses = {column: _check_response(record[column], where, column) for column in columns}
    if prompt is None or isinstance(prompt, str):
        prompt = None if prompt is None else _check_text(prompt, where, "prompt")
        return split_conversations(prompt, responses, where)
    for column, messages in responses.items():
        if messages[0]["role"] != "assistant":
            raise PreferenceDataError(
                f"{where}, column {column!r}: beside a prompt of messages, the response must begin with the "
                f"assistant's message, not {messages[0]['role']!r}; leave the prompt column out if the responses hold "
                "the whole conversation"
            )
    return {"prompt": check_messages(prompt, where, "prompt"), **responses}


def _check_response(value: Any, where: str, column: str) -> Messages:
    messages = check_messages(value, where, column)
    last = messages[-1]
    if last["role"] != "assistant":
        raise PreferenceDataError(
            f"{where}, column {column!r}: the last message is not the assistant's, but {last['role']!r}"
        )
    if not last.get("tool_calls"):
        _check_filled(last["content"], where, column)
    return messages
