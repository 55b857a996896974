"""Conversations to text through a tokenizer's chat template; what the template would leave out is refused."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

from dil_kernels.data import Pair, PreferenceDataError, response_columns
from dil_kernels.pairs.messages import TEMPLATE_OPTIONS, TOOLS, Messages

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # names of the same thing


def render_conversation(pair: Pair, tokenizer: Any, where: str) -> tuple[str, dict[str, str]]:
    """The text of the prompt, up to where generation starts, and of the whole conversation with each response.

    Raises:
        PreferenceDataError: the template refuses the conversation, has no place for its tools, tool calls or
            reasoning, or renders the prompt alone differently from the prompt within the conversation.
    """
    options = dict(pair.get(TEMPLATE_OPTIONS, {}))
    if TOOLS in pair:
        options[TOOLS] = pair[TOOLS]
    columns = response_columns(pair)
    try:
        template = tokenizer.get_chat_template(options.get("chat_template"), pair.get(TOOLS))
        if TOOLS in pair and not _names(template, TOOLS):
            raise PreferenceDataError(f"{where}, column {TOOLS!r}: the chat template has no place for tools")
        parts = {name: _check_read(pair[name], template, f"{where}, column {name!r}") for name in ("prompt", *columns)}
        prompt = str(
            tokenizer.apply_chat_template(parts["prompt"], tokenize=False, add_generation_prompt=True, **options)
        )
        texts = {
            column: str(tokenizer.apply_chat_template(parts["prompt"] + parts[column], tokenize=False, **options))
            for column in columns
        }
    except PreferenceDataError:
        raise
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        raise PreferenceDataError(f"{where}: the chat template refuses this conversation: {error}") from error
    for column, text in texts.items():
        if not text.startswith(prompt):
            raise PreferenceDataError(
                f"{where}, column {column!r}: the template renders the prompt alone, ending with {prompt[-40:]!r}, "
                "differently from the prompt within the conversation: which tokens are the response is not known (an "
                "option of the template may help: a column chat_template_kwargs, such as {'enable_thinking': false})"
            )
    return prompt, texts


def _check_read(messages: Messages, template: str, where: str) -> Messages:
    """The messages, with reasoning under the names that the template reads.

    Raises:
        PreferenceDataError: a message has tool calls or reasoning that the template never names, and so leaves out.
    """
    reasoning_keys = [key for key in REASONING_KEYS if _names(template, key)]
    read = []
    for number, message in enumerate(messages, start=1):
        reasoning = next((key for key in REASONING_KEYS if message.get(key)), None)
        lost = None if reasoning_keys else reasoning
        if message.get("tool_calls") and not _names(template, "tool_calls"):
            lost = "tool_calls"
        if lost is not None:
            raise PreferenceDataError(f"{where}, message {number}: the chat template has no place for {lost}")
        read.append(message if reasoning is None else {**dict.fromkeys(reasoning_keys, message[reasoning]), **message})
    return read


def _names(template: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", template) is not None
