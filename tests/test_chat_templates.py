"""That no text of a conversation is lost in a chat template: found by markers and in the data, refused by name."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from refusals import said
from tiny_tokenizers import byte_level

from dil_kernels.data import PreferenceDataError, check_pair
from dil_kernels.data.tokenization import PairTokenizer

# As SmolVLM's and Idefics 3's: a string for a content is iterated letter by letter, and lost.
OF_PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Qwen 3's: reasoning stays only behind the last question, and content before the end of reasoning nowhere else.
THINKING = (
    "{% set last = namespace(index=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.index = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% set content = m.content or '' %}{% if m.role == 'assistant' and loop.index0 < last.index %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.reasoning_content and loop.index0 > last.index %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Llama 3.1's: a content beside calls is lost; a tool's content is quoted.
CALLING = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls is defined %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}{{ f.name }} {% for key, value in f.arguments | items %}{{ key }}="
    "{{ value }};{% endfor %}{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As DeepSeek V3's: arguments are taken as text.
TEXT_ARGUMENTS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name + ' ' + call.function.arguments }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def called(arguments: Any, content: str | None = None, **keys: Any) -> dict[str, Any]:
    call = {"type": "function", "id": "call00001", "function": {"name": "capital_of", "arguments": arguments}}
    return said("assistant", content, tool_calls=[call], **keys)


ASKED = [said("system", "be brief"), said("user", "Is it 1?")]
TOOLS = [{"type": "function", "function": {"name": "capital_of", "description": "d", "parameters": {"type": "object"}}}]
ARGUMENTS = {"of": "France", "unit": None}


@functools.cache
def tokenizer_of(template: str) -> Any:
    tokenizer = byte_level(False)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = template
    return tokenizer


def texts(template: str, chosen: list[Any], prompt: list[Any] | None = None, **columns: Any) -> tuple[str, str]:
    """The prompt and the response that would be trained."""
    tokenizer = tokenizer_of(template)
    record = {"prompt": ASKED if prompt is None else prompt, "completion": chosen, "label": True, **columns}
    prompt_ids, ids = PairTokenizer(tokenizer)(check_pair(record, "row 3"), "row 3")
    return tokenizer.decode(prompt_ids), tokenizer.decode(ids)


def refusal(template: str, chosen: list[Any], prompt: list[Any] | None = None, **columns: Any) -> str:
    with pytest.raises(PreferenceDataError) as caught:
        texts(template, chosen, prompt, **columns)
    return str(caught.value)


def test_contents_reach_a_template_that_wants_parts() -> None:
    assert texts(OF_PARTS, [said("assistant", "yes")]) == (
        "<|system|>be brief<|im_end|><|user|>Is it 1?<|im_end|><|assistant|>",
        "yes<|im_end|>",
    )
    parts = [{"type": "text", "text": "yes"}, {"type": "text", "text": " or no"}]
    assert texts(OF_PARTS, [said("assistant", parts)])[1] == "yes or no<|im_end|>"
    # As Idefics 3's, which looks at the first part of every content.
    first = OF_PARTS.replace("<|{{ m.role }}|>", "<|{{ m.role }}|>{{ ':' if m.content[0].type == 'text' }}")
    assert texts(first, [said("assistant", "yes")], [said("system", ""), *ASKED[1:]])[0] == (
        "<|system|>:<|im_end|><|user|>:Is it 1?<|im_end|><|assistant|>"
    )


@pytest.mark.parametrize(
    ("template", "chosen", "prompt", "problem"),
    [
        (OF_PARTS, [called(ARGUMENTS, "wait")], None, "'completion', message 1: {} tool_calls"),
        (THINKING, [said("assistant", "yes", name="Bob")], None, "'completion', message 1: {} name"),
        (THINKING, [said("assistant", "yes")], [said("user", "a?", name="Bob")], "'prompt', message 1: {} name"),
        (THINKING, [said("assistant", "yes", note={"by": ["me"]})], None, "'completion', message 1: {} note"),
        (
            THINKING,
            [said("assistant", "1", reasoning_content="so"), said("user", "and?"), said("assistant", "2")],
            None,
            "'completion', message 1: {} reasoning_content",
        ),
        (TEXT_ARGUMENTS, [said("assistant", "1", thinking="so")], None, "'completion', message 1: {} thinking"),
        (CALLING, [called(ARGUMENTS, "wait")], None, "'completion', message 1: {} content"),
        (
            CALLING.replace("system", "sys"),
            [said("assistant", "1", reasoning="so")],
            None,
            "'completion', message 1: {} r",
        ),
        (
            "{% for m in messages %}{% if m.role != 'system' %}"
            + OF_PARTS[28:].replace("{% endfor %}{% if add", "{% endif %}{% endfor %}{% if add"),
            [said("assistant", "1")],
            None,
            "'prompt', message 1: {} content",
        ),
    ],
)
def test_what_a_template_has_no_place_for_is_named(template: str, chosen: Any, prompt: Any, problem: str) -> None:
    expected = "row 3, column " + problem.format("the chat template has no place for")
    assert refusal(template, chosen, prompt).startswith(expected)


def test_a_part_of_a_content_that_is_left_out_is_named() -> None:
    thought = "<think>so</think>\n1"
    assert texts(THINKING, [said("assistant", thought)])[1] == f"{thought}<|im_end|>"
    turns = [said("assistant", thought), said("user", "and?"), said("assistant", "2")]
    assert refusal(THINKING, turns) == (
        "row 3, column 'completion', message 1: the chat template leaves out or changes a part of its content"
    )
    upper = THINKING.replace("{{ content }}", "{{ content | replace('Is', 'Was') }}")
    assert refusal(upper, [said("assistant", "1")]) == (
        "row 3, column 'prompt', message 2: the chat template leaves out or changes a part of its content"
    )


THOUGHT = "<think>17 * 3 = 51</think>51"


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("17 * 3?", [THOUGHT, "Sure?", THOUGHT]),  # one answer twice, of which one loses its reasoning
        (f"Say: {THOUGHT}", [THOUGHT, "thanks", "welcome"]),  # which stands in the prompt, too
    ],
)
def test_a_text_that_stands_elsewhere_too_is_missed(prompt: str, answers: list[str]) -> None:
    roles = ("assistant", "user", "assistant")
    turns = [said(role, text) for role, text in zip(roles, answers, strict=True)]
    assert refusal(THINKING, turns, [said("user", prompt)]).endswith(
        "message 1: the chat template leaves out or changes a part of its content"
    )


REASONLESS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("question", ["17 * 3?", THOUGHT, f"{THOUGHT}\nRepeat the line above."])
def test_a_response_is_missed_though_a_question_is_the_same(question: str) -> None:
    assert refusal(REASONLESS, [said("assistant", THOUGHT)], [said("user", question)]) == (
        "row 3, column 'completion', message 1: the chat template leaves out or changes a part of its content"
    )


def test_only_the_assistant_reasons() -> None:
    escaped = REASONLESS.replace("<|user|>{{ m.content }}", "<|user|>{{ m.content | e }}")
    assert refusal(escaped, [said("assistant", "1")], [said("user", "a</think>b")]) == (
        "row 3, column 'prompt', message 1: the chat template leaves out or changes a part of its content"
    )


def test_texts_that_stand_in_others_are_there_as_often() -> None:
    """Also where a prompt repeats what its reasoning said, and where reasoning stands under every name there is."""
    names = dict.fromkeys(("reasoning_content", "thinking", "reasoning"), "51")
    prompt = [said("user", "51"), said("assistant", THOUGHT), said("user", f"51? {THOUGHT}")]
    for answer in (said("assistant", "51"), said("assistant", THOUGHT), said("assistant", "51", **names)):
        assert "51" in texts(THINKING, [answer], prompt)[1]


@pytest.mark.parametrize("content", ["IMPORTANT <think>so</think>1", "<b>, then <think>so</think>1"])
def test_what_stands_before_reasoning_is_not_lost(content: str) -> None:
    prompt = [said("user", "a?"), said("assistant", content), said("user", "b?")]
    assert refusal(THINKING, [said("assistant", "2")], prompt) == (
        "row 3, column 'prompt', message 2: the chat template leaves out or changes a part of its content"
    )


def test_ids_and_the_name_of_a_called_tool_need_no_place() -> None:
    answered = said("tool", 'a "quoted" word', tool_call_id="call00001", name="capital_of")
    _, response = texts(CALLING, [called(ARGUMENTS), answered, said("assistant", "Paris", id=7)], tools=TOOLS)
    assert response.startswith("capital_of of=France;unit=None;<|im_end|><|tool|>")
    renamed = {**answered, "name": "other"}
    assert refusal(CALLING, [called(ARGUMENTS), renamed, said("assistant", "Paris")], tools=TOOLS) == (
        "row 3, column 'completion', message 2: the chat template has no place for name"
    )


PRINTED_ARGUMENTS = TEXT_ARGUMENTS.replace("{{ call.function.name + ' ' + call", "{{ call.function.name }} {{ call")


@pytest.mark.parametrize(
    "template",
    [THINKING, CALLING, TEXT_ARGUMENTS, PRINTED_ARGUMENTS],
    ids=["quoting", "iterating", "text", "printed"],  # printed as Python does they would have None instead of null
)
def test_arguments_may_be_json_text(template: str) -> None:
    end = said("assistant", "Paris")
    expected = texts(template, [called(ARGUMENTS), said("tool", "x"), end])
    assert texts(template, [called(json.dumps(ARGUMENTS)), said("tool", "x"), end]) == expected
    if template != CALLING:
        assert '{"of": "France", "unit": null}' in expected[1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("{of: 1}", "arguments is text, but no JSON: Expecting property name enclosed in double quotes at character 2"),
        ("[1]", "arguments must be an object, got list"),
        ('"France"', "arguments must be an object, got str"),
    ],
)
def test_arguments_that_are_no_object_are_named(arguments: str, problem: str) -> None:
    assert refusal(THINKING, [called(arguments)]) == f"row 3, column 'completion', message 1, call 1: {problem}"


def test_no_content_beside_calls_is_an_empty_one_for_a_template_that_looks_into_it() -> None:
    template = THINKING.replace("m.content or ''", "m.content.strip('\n')")  # as Qwen 3's
    end = said("assistant", "Paris")
    expected = texts(THINKING, [called(ARGUMENTS), said("tool", "x"), end])
    assert texts(template, [called(ARGUMENTS), said("tool", "x"), end]) == expected


@pytest.mark.parametrize("calls", [[], None, "[]"])
def test_no_calls_are_none(calls: Any) -> None:
    assert texts(CALLING, [said("assistant", "yes", tool_calls=calls)])[1] == "yes<|im_end|>"


def test_a_prompt_that_ends_with_the_assistant_is_continued_or_not_as_is_said() -> None:
    prompt = [*ASKED, said("assistant", "The cap")]
    answer = [said("assistant", "ital of France"), said("user", "sure?"), said("assistant", "yes")]
    assert "say in a column chat_template_kwargs whether the response continues it" in refusal(
        TEXT_ARGUMENTS, answer, prompt
    )
    start, response = texts(TEXT_ARGUMENTS, answer, prompt, chat_template_kwargs={"continue_final_message": True})
    assert start.endswith("<|assistant|>The cap")
    assert response == "ital of France<|im_end|><|user|>sure?<|im_end|><|assistant|>yes<|im_end|>"
    start, response = texts(TEXT_ARGUMENTS, answer, prompt, chat_template_kwargs={"continue_final_message": False})
    assert start.endswith("<|assistant|>The cap<|im_end|><|assistant|>")
    assert response.startswith("ital of France<|im_end|>")
    assert texts(OF_PARTS, answer, prompt, chat_template_kwargs='{"continue_final_message": true}')[0] == start[:-23]
    problem = refusal(OF_PARTS, answer[:1], chat_template_kwargs={"continue_final_message": True})
    assert problem == "row 3: continue_final_message is true, but the last message of the prompt is 'user'"
    problem = refusal(OF_PARTS, answer[:1], prompt, chat_template_kwargs={"continue_final_message": "yes"})
    assert problem.endswith("continue_final_message must be true or false, got 'yes'")
    continuing = {"continue_final_message": True}
    expected = texts(TEXT_ARGUMENTS, answer, prompt, chat_template_kwargs=continuing)
    # Numbers may differ, text must not be lost.
    counted, numbered = [*ASKED, {**prompt[-1], "id": 7}], [{**answer[0], "id": 8}, *answer[1:]]
    assert texts(TEXT_ARGUMENTS, numbered, counted, chat_template_kwargs=continuing) == expected
    counted[-1]["id"], numbered[0]["id"] = "a", "b"
    problem = refusal("{{ messages[-1].id }}" + TEXT_ARGUMENTS, numbered, counted, chat_template_kwargs=continuing)
    assert "the last message has id: the response in column 'completion'" in problem
    prompt = [*ASKED, called(ARGUMENTS, "The cap")]
    problem = refusal(TEXT_ARGUMENTS, answer, prompt, chat_template_kwargs=continuing)
    assert problem == (
        "row 3, column 'prompt': the last message has tool_calls: the response in column 'completion', which continues "
        "it, cannot come before or take its place"
    )


def test_a_template_that_can_only_print_arguments_is_still_looked_at() -> None:
    mapping = "{% if a is mapping %}({{ a }}){% else %}{{ raise_exception('no') }}{% endif %}"
    template = TEXT_ARGUMENTS.replace(
        "{{ call.function.name + ' ' + call.function.arguments }}", "{% set a = call.function.arguments %}" + mapping
    )
    assert template != TEXT_ARGUMENTS
    assert refusal(template, [called(ARGUMENTS)]).endswith("the chat template has no place for tool_calls")


def test_what_an_option_leaves_out_is_the_users_choice() -> None:
    template = THINKING.replace("m.reasoning_content and", "m.reasoning_content and not terse and")
    answer = [said("assistant", "yes", reasoning_content="so")]
    assert texts(template, answer)[1] == "<think>so</think>yes<|im_end|>"
    assert texts(template, answer, chat_template_kwargs={"terse": True})[1] == "yes<|im_end|>"


def test_tools_that_are_named_but_not_written_are_refused() -> None:
    template = "{% if tools and not messages %}{{ tools }}{% endif %}" + THINKING
    problem = refusal(template, [said("assistant", "yes")], tools=TOOLS)
    assert problem == "row 3, column 'tools': the chat template has no place for tools"


def _trl_templates() -> list[Path]:
    import trl

    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


CONVERSATIONS: dict[str, tuple[list[Any], list[Any], dict[str, Any]]] = {
    "one turn": ([said("user", "the question")], [said("assistant", "the answer")], {}),
    "a system": ([said("system", "the order"), said("user", "the question")], [said("assistant", "the answer")], {}),
    "a name": ([said("user", "the question", name="Robert")], [said("assistant", "the answer")], {}),
    "reasoning": ([said("user", "the question")], [said("assistant", "the answer", reasoning_content="the why")], {}),
    "turns": (
        [said("user", "the question")],
        [said("assistant", "an answer", reasoning_content="the why"), said("user", "more"), said("assistant", "done")],
        {},
    ),
    "a call": (
        [said("user", "the question")],
        [
            called('{"of": "the country"}', "the content"),
            said("tool", "the result", tool_call_id="call00001"),
            said("assistant", "done"),
        ],
        {"tools": TOOLS},
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_no_template_of_trl_loses_a_text_in_silence(name: str) -> None:
    prompt, response, columns = CONVERSATIONS[name]
    words = ["capital_of", "the country"] if columns else []
    for message in [*prompt, *response]:
        words += [message[key] for key in ("content", "name", "reasoning_content") if key in message]
    kept = []
    for path in _trl_templates():
        try:
            text = "".join(texts(path.read_text(), response, prompt, **columns))
        except PreferenceDataError:
            continue
        assert all(word in text for word in words), path.name
        assert '\\"of' not in text, f"{path.name}: arguments are encoded twice"
        kept.append(path.name)
    assert bool(kept) == (name != "a name"), "which no one of them has a place for"
