"""Conversations to text through a tokenizer's chat template; what the template would leave out is refused."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from dil_kernels.data import Pair, PreferenceDataError, response_columns
from dil_kernels.messages import TEMPLATE_OPTIONS, TOOLS

# Of messages: a template that does not name these drops a part of what was said.
SPOKEN_KEYS = ("tool_calls", "reasoning_content", "thinking")


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
        _refuse_unread(pair, tokenizer.get_chat_template(options.get("chat_template"), pair.get(TOOLS)), where)
        prompt = str(
            tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True, **options)
        )
        texts = {
            column: str(tokenizer.apply_chat_template(pair["prompt"] + pair[column], tokenize=False, **options))
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
                "differently from the prompt within the conversation: which tokens are the response is not known"
            )
    return prompt, texts


def _refuse_unread(pair: Pair, template: str, where: str) -> None:
    """Refuse what the template never names, and so would silently leave out."""
    if TOOLS in pair and TOOLS not in template:
        raise PreferenceDataError(f"{where}, column {TOOLS!r}: the chat template has no place for tools")
    for column in ("prompt", *response_columns(pair)):
        for number, message in enumerate(pair[column], start=1):
            for key in SPOKEN_KEYS:
                if message.get(key) and key not in template:
                    raise PreferenceDataError(
                        f"{where}, column {column!r}, message {number}: the chat template has no place for {key}"
                    )
