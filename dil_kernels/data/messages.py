"""Conversations as preference data have them: messages, tools and options of the chat template, checked.

A message has a role and a content; every other key (tool_calls, tool_call_id, name, reasoning_content, ...) goes to
the chat template as it is. A column of a data set has one type, which objects of any form do not fit: there, such keys
stand as JSON text in a field `extra` of their message, and tools and template options as JSON text in their columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dil_kernels.data.json_text import looks_like_messages, parse_json

EXTRA = "extra"
TOOLS = "tools"
TEMPLATE_OPTIONS = "chat_template_kwargs"
JSON_COLUMNS = (TOOLS, TEMPLATE_OPTIONS)
CONTINUE = "continue_final_message"  # of the options, says whether a response goes on with the prompt's last message
MEDIA = frozenset({"image", "images", "image_url", "video", "videos", "audio", "audios"})
# The roles of those who speak in ShareGPT's form.
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
BLANKS = frozenset(" \t")
# Keywords of `apply_chat_template` that are not the template's.
RESERVED_OPTIONS = frozenset(
    {
        "add_generation_prompt",
        "conversation",
        "max_length",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)

Message = dict[str, Any]
Messages = list[Message]


class PreferenceDataError(ValueError):
    """Preference data that cannot be trained on; names the file, the line or row (counted from 1) and the column."""


class NoPromptError(PreferenceDataError):
    """There is no column of prompts, and the responses share nothing that could be one."""


def check_messages(value: Any, where: str, column: str) -> Messages:
    """The messages of a conversation: role and content, and whatever other keys each has.

    A content in parts must be of text, and is joined. Only a message with tool calls may be without content (None).

    Raises:
        PreferenceDataError: not a list of messages, or a broken one.
    """
    if (plain := plain_messages(value)) is not None:
        return plain
    where = f"{where}, column {column!r}"
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        kind = type(value).__name__
        raise PreferenceDataError(f"{where}: expected a string or a list of {{role, content}} messages, got {kind}")
    if not value:
        raise PreferenceDataError(f"{where}: the list of messages is empty")
    return [_check_message(message, f"{where}, message {number}") for number, message in enumerate(value, start=1)]


def plain_messages(value: Any) -> Messages | None:
    """Messages of nothing but a role and a content, which most are; None where they must be looked at more closely."""
    if type(value) is not list or not value:
        return None
    messages = []
    for message in value:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if type(role) is not str or type(content) is not str:
            return None
        if not (role.isascii() and content.isascii()) and not _is_unicode(role + content):
            return None
        messages.append({"role": role, "content": content})
    return messages


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise PreferenceDataError(f"{where}: expected {{role, content}}, got {value!r:.40}")
    # Tables have every key in every message; so a null says no more than a key that is not there.
    message = {key: item for key, item in value.items() if key != EXTRA and item is not None}
    if value.get(EXTRA) is not None:
        others = _check_extra(value[EXTRA], where)
        if twice := sorted(others.keys() & message.keys()):
            raise PreferenceDataError(
                f"{where}: extra, JSON text of other keys, has {', '.join(twice)}, and so has the message itself"
            )
        message |= others
    if "role" not in message and {"from", "value"} <= message.keys():
        message = _from_sharegpt(message, where)
    if not isinstance(message.get("role"), str):
        raise PreferenceDataError(f"{where}: role must be a string, got {type(message.get('role')).__name__}")
    calls = message.pop("tool_calls", None)
    if calls := [] if calls is None else _check_objects(calls, where, "tool_calls"):
        message["tool_calls"] = [_check_call(call, f"{where}, call {n}") for n, call in enumerate(calls, start=1)]
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = "".join(_check_part(part, f"{where}, part {number}") for number, part in enumerate(content, start=1))
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise PreferenceDataError(f"{where}: content must be a string, got {type(content).__name__}")
    message = {"role": message.pop("role"), "content": content, **{k: v for k, v in message.items() if k != "content"}}
    check_unicode(json.dumps(message, ensure_ascii=False, default=str), where)
    return message


def _from_sharegpt(message: Message, where: str) -> Message:
    """A message whose keys are those of ShareGPT: from and value."""
    speaker = message.pop("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise PreferenceDataError(f"{where}: from must be one of {', '.join(SPEAKERS)}, got {speaker!r:.40}")
    return {"role": SPEAKERS[speaker], "content": message.pop("value"), **message}


def _check_extra(value: Any, where: str) -> dict[str, Any]:
    """The other keys of a message, as `storable_messages` keeps them; any other value is the user's own."""
    keys = None
    if isinstance(value, str):
        try:
            keys = parse_json(value)
        except json.JSONDecodeError:
            pass  # a text
        except ValueError as error:
            raise PreferenceDataError(f"{where}: extra is JSON text of other keys, but {error}") from error
    return keys if isinstance(keys, dict) else {EXTRA: value}


def _check_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise PreferenceDataError(f"{where}: only parts {{type: text, text: ...}} can be trained on, got {kind!r}")
    if media := [key for key in MEDIA & part.keys() if part[key]]:
        raise PreferenceDataError(f"{where}: only text can be trained on, got {', '.join(sorted(media))}, too")
    return str(part["text"])


def _check_objects(value: Any, where: str, name: str) -> list[dict[str, Any]]:
    """A list of objects, given as such or as JSON text."""
    value = _parsed(value, where, name)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise PreferenceDataError(f"{where}: {name} must be a list of objects, got {type(value).__name__}")
    for number, item in enumerate(value, start=1):
        if not isinstance(item, Mapping):
            raise PreferenceDataError(f"{where}: {name} must be a list of objects, but {number} is {item!r:.40}")
    return [dict(item) for item in value]


def _check_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool call, with its arguments as the object that chat templates expect, given as such or as JSON text."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _check_call(dict(call["function"]), where)}
    if not isinstance(call.get("arguments"), str):
        return call
    arguments = _parsed(call["arguments"], where, "arguments")
    if not isinstance(arguments, Mapping):
        raise PreferenceDataError(f"{where}: arguments must be an object, got {type(arguments).__name__}")
    return {**call, "arguments": dict(arguments)}


def _parsed(value: Any, where: str, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at character {error.pos + 1}"
    except ValueError as error:
        problem = str(error)
    raise PreferenceDataError(f"{where}: {name} is text, but no JSON: {problem}")


def messages_of_text(columns: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The columns that are JSON text of messages, parsed.

    Args:
        columns: of a record, by name.
        where: its place, for the message.

    Raises:
        PreferenceDataError: a text is a list of messages as Python prints it, or of broken JSON.
    """
    found = {}
    for name, text in columns.items():
        if isinstance(text, str) and looks_like_messages(text):
            found[name] = _parsed(text, f"{where}, column {name!r}", "the list of messages")
    return found


def check_json_columns(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tools and the options of the chat template of a record, where it has any.

    Raises:
        PreferenceDataError: they are not a list of JSON schemas and an object, or JSON text of such.
    """
    checked: dict[str, Any] = {}
    for name in JSON_COLUMNS:
        place = f"{where}, column {name!r}"
        value = _parsed(record.get(name), place, name)
        if value is not None:
            checked[name] = _check_objects(value, place, name) if name == TOOLS else _check_options(value, place)
            check_unicode(json.dumps(checked[name], ensure_ascii=False, default=str), place)
    return {name: value for name, value in checked.items() if value}


def _check_options(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise PreferenceDataError(f"{where}: expected an object, got {type(value).__name__}")
    if reserved := sorted(RESERVED_OPTIONS & value.keys()):
        raise PreferenceDataError(f"{where}: {', '.join(reserved)} cannot be set for a row")
    if not isinstance(value.get(CONTINUE, False), bool):
        raise PreferenceDataError(f"{where}: {CONTINUE} must be true or false, got {value[CONTINUE]!r:.40}")
    return dict(value)


def split_conversations(prompt: str | None, responses: Mapping[str, Messages], where: str) -> dict[str, Messages]:
    """The prompt and the answers of whole conversations.

    The prompt is what chosen and rejected share, or of a single conversation all but its last message; every answer
    keeps a message.

    Args:
        prompt: the user's message, where the data give it apart; it must be one of those shared.
        responses: by column.
        where: their place, for the message.

    Raises:
        PreferenceDataError: nothing is shared, or an answer does not begin with the assistant.
    """
    first, *others = responses.values()
    shared = min(map(len, responses.values())) - 1
    for other in others:
        shared = next((index for index in range(shared) if first[index] != other[index]), shared)
    prompt_messages = first[:shared]
    if not shared and prompt is not None and all(len(messages) == 1 for messages in responses.values()):
        prompt_messages = [{"role": "user", "content": prompt}]
    elif not shared and any(len(messages) > 1 for messages in responses.values()):
        raise PreferenceDataError(f"{where}: {' and '.join(responses)} share no message that could be the prompt")
    elif not shared:
        raise NoPromptError(f"{where}: column 'prompt' is missing, and the responses hold only the answer")
    if prompt is not None and prompt.strip() not in [str(message["content"]).strip() for message in prompt_messages]:
        raise PreferenceDataError(
            f"{where}, column 'prompt': not a message of the conversation in {' and '.join(responses)}"
        )
    answers = {column: messages[shared:] for column, messages in responses.items()}
    for column, messages in answers.items():
        if messages[0]["role"] != "assistant":
            raise PreferenceDataError(
                f"{where}, column {column!r}: {' and '.join(responses)} differ from message {shared + 1} on, which is "
                f"not the assistant's, but {messages[0]['role']!r}: they answer different prompts"
            )
    return {"prompt": prompt_messages, **answers}


def split_strings(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """The prompt that two strings share, and what follows it in each.

    The prompt ends after a line or before the space of the first word that differs, so that no word is torn; both
    responses keep a word.

    Raises:
        PreferenceDataError: they share no line or word.
    """
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    for end in range(min(len(chosen), len(rejected)) if shared is None else shared, 0, -1):
        before_a_space = not chosen[end - 1].isspace() and {chosen[end : end + 1], rejected[end : end + 1]} <= BLANKS
        if before_a_space or chosen[end - 1] == "\n":
            parts = chosen[:end], chosen[end:], rejected[end:]
            if all(part.strip() for part in parts):
                return parts
    raise NoPromptError(
        f"{where}: column 'prompt' is missing, and chosen and rejected begin with no line or word in common"
    )


def storable_messages(messages: Messages, *, extra: bool) -> Messages:
    """Messages as a column of a data set holds them.

    Args:
        messages: checked.
        extra: the column has the field for other keys.
    """
    stored = []
    for message in messages:
        field = {EXTRA: stored_extra(message)} if extra else {}
        stored.append({"role": message["role"], "content": message["content"], **field})
    return stored


def stored_extra(message: Message) -> str | None:
    """The keys of a message beside role and content, as JSON text; None without any."""
    others = {key: value for key, value in message.items() if key not in ("role", "content")}
    return json.dumps(others, default=str) if others else None


def has_extra(messages: Iterable[Message]) -> bool:
    """Whether a message has keys beside role and content."""
    return max(map(len, messages)) > 2  # each has a role and a content


def check_unicode(text: str, where: str) -> None:
    """Refuse text that no tokenizer takes.

    Raises:
        PreferenceDataError: it has surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PreferenceDataError(f"{where}: not valid Unicode: {error.reason}") from error
