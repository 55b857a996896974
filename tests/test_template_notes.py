"""What a chat template leaves out in training as in generation is said, once."""

from __future__ import annotations

import pytest
from refusals import said
from test_chat_templates import THINKING, texts, tokenizer_of

from dil_kernels.data import check_pair
from dil_kernels.data.tokenization import PairTokenizer


def test_reasoning_of_a_prompt_is_left_out_as_in_generation_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenize = PairTokenizer(tokenizer_of(THINKING))
    for answer in (said("assistant", "1", reasoning_content="so"), said("assistant", "<think>so</think>1")):
        prompt = [said("user", "a?"), answer, said("user", "b?")]
        record = {"prompt": prompt, "completion": [said("assistant", "2")], "label": True}
        ids, _ = tokenize(check_pair(record, "row 3"), "row 3")
        assert tokenizer_of(THINKING).decode(ids).endswith("<|assistant|>1<|im_end|><|user|>b?<|im_end|><|assistant|>")
    assert caplog.messages == [
        f"row 3, column 'prompt', message 2: the chat template leaves out {what}, in training as in generation; "
        "this is said of the first such row alone"
        for what in ("reasoning_content", "the reasoning in its content, all before </think>")
    ]


def test_descriptions_of_tools_that_are_left_out_are_said(caplog: pytest.LogCaptureFixture) -> None:
    unit = {"type": "object", "properties": {"z": {"type": "string", "description": "of its kind"}}}
    tool = {"name": "f", "description": "does it", "parameters": {"type": "object", "properties": {"unit": unit}}}
    written = "{% for tool in tools %}{{ tool.function.name }}: {{ tool.function.description }}{% endfor %}"
    for tools in (
        [{"type": "function", "function": {**tool, "parameters": {}}}],
        [{"type": "function", "function": tool}],
    ):
        assert not caplog.messages
        texts(written + THINKING, [said("assistant", "1")], tools=tools)
    assert caplog.messages == [
        f"row 3, column 'tools': the chat template leaves out {what}, in training as in generation; this is said of "
        "the first such row alone"
        for what in ("a parameter", "a description")
    ]


def test_parameters_of_tools_are_looked_for_by_name(caplog: pytest.LogCaptureFixture) -> None:
    city = {"type": "string", "enum": ["Paris", "Rome"]}
    schema = {"type": "object", "properties": {"city": city, "unit": city}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    start = "{% for t in tools %}{{ t.function.name }}"
    names = start + "{% for p in t.function.parameters.properties %} {{ p }}{% endfor %}"
    required = "{% for p in t.function.parameters.required %} {{ p }}{% endfor %}"
    for template, said_of in (
        (names + "{% endfor %}", []),
        ("{{ tools | tojson }}", []),
        (names.replace("properties %}", "properties if p in t.function.parameters.required %}") + "{% endfor %}", [1]),
        (start + required + "{% endfor %}", [1]),
    ):
        caplog.clear()
        texts(template + THINKING, [said("assistant", "1")], tools=tools)
        assert len([message for message in caplog.messages if "leaves out a parameter" in message]) == len(said_of)


def test_options_that_a_template_does_not_read_are_said(caplog: pytest.LogCaptureFixture) -> None:
    texts(THINKING, [said("assistant", "1")], chat_template_kwargs={"documents": [{"text": "w1"}]})
    texts(THINKING, [said("assistant", "1")], chat_template_kwargs={"a(b": 1})
    assert caplog.messages == [
        f"row 3, column 'chat_template_kwargs': the chat template leaves out the option {name!r}, in training as in "
        "generation; this is said of the first such row alone"
        for name in ("documents", "a(b")
    ]
    caplog.clear()
    reading = "{{ documents[0].text }}" + THINKING
    prompt, _ = texts(reading, [said("assistant", "1")], chat_template_kwargs={"documents": [{"text": "w1"}]})
    assert prompt.startswith("w1")
    assert not caplog.messages
