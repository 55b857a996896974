"""What conversations may hold: tools, tool calls, reasoning, parts, template options, several turns, shared prompts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from refusals import LENGTHS, said
from tiny_model import make_tokenizer, write_lines
from transformers import PreTrainedTokenizerFast

from dil_kernels.data import PreferenceDataError, check_pair, load_preference_pairs
from dil_kernels.data.messages import split_strings
from dil_kernels.data.tokenization import tokenize_dataset, tokenize_pair

pytestmark = pytest.mark.usefixtures("datasets_cache")

TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>"
    "{% if m.name %} w100 {{ m.name }} {% endif %}"
    "{% if m.reasoning_content and style != 'terse' %} w101 {{ m.reasoning_content }} w102 {% endif %}"
    "{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %} w104 {{ call.function.name }} {{ call.function.arguments | tojson }} "
    "{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": "w7", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
OTHER_TOOLS = [{"type": "function", "function": {"name": "w8", "parameters": {"properties": {"b": {"enum": [1]}}}}}]
ASKED = [said("system", "w9"), said("user", "w1 w2", name="w30")]
CALLED = {
    "prompt": ASKED,
    "chosen": [
        said("assistant", None, tool_calls=[call("w7", {"a": 1, "n": None})], reasoning_content="w20 w21"),
        said("tool", "w5", tool_call_id="t1"),
        said("assistant", "w3 w4"),
    ],
    "rejected": [said("assistant", "w6")],
    "tools": TOOLS,
}
PLAIN = {"prompt": ASKED[:1], "chosen": [said("assistant", "w3")], "rejected": [said("assistant", "w4")]}


def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(TEMPLATE)


def rendered(pair: dict[str, Any], **options: Any) -> list[list[int]]:
    """Token ids of the prompt and of both whole conversations, by the template alone."""
    texts = [
        tokenizer().apply_chat_template(
            pair["prompt"] + pair.get(column, []),
            tools=pair.get("tools"),
            tokenize=False,
            add_generation_prompt=column == "prompt only",
            **options,
        )
        for column in ("prompt only", "chosen", "rejected")
    ]
    return [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]


def refusal(record: dict[str, Any]) -> str:
    with pytest.raises(PreferenceDataError) as caught:
        tokenize_pair(check_pair(record, "row 3"), tokenizer(), "row 3")
    return str(caught.value)


@pytest.mark.parametrize("form", ["jsonl", "parquet with JSON text", "directory", "data set"])
def test_every_key_reaches_the_template_from_every_source(tmp_path: Path, form: str) -> None:
    other = {**CALLED, "rejected": [said("assistant", "", tool_calls=[call("w8", {"b": [1, "x"]})])]}
    pairs = [CALLED, {**other, "tools": OTHER_TOOLS}, PLAIN, {**CALLED, "chat_template_kwargs": {"style": "terse"}}]
    path = write_lines(tmp_path / "set" / "train.jsonl", *pairs)
    loaded = load_preference_pairs(path)
    if form == "parquet with JSON text":
        loaded.to_parquet(tmp_path / "pairs.parquet")
        loaded = load_preference_pairs(tmp_path / "pairs.parquet")
    elif form == "directory":
        loaded = load_preference_pairs(path.parent)
    elif form == "data set":
        loaded = datasets.Dataset.from_list(loaded.to_list())
    tokenized = tokenize_dataset(loaded, tokenizer(), **LENGTHS).to_list()
    assert len(tokenized) == 4
    for row, pair in zip(tokenized, pairs, strict=True):
        prompt, chosen, rejected = rendered(pair, **pair.get("chat_template_kwargs", {}))
        assert row["prompt_ids"] == prompt
        assert row["prompt_ids"] + row["chosen_ids"] == chosen
        assert row["prompt_ids"] + row["rejected_ids"] == rejected
    # Each part has been said, and a template option changed it.
    ids = {word: tokenizer().convert_tokens_to_ids(word) for word in ("w100", "w101", "w104")}
    assert ids["w100"] in tokenized[0]["prompt_ids"]
    assert {ids["w101"], ids["w104"]} <= {*tokenized[0]["chosen_ids"]}
    assert ids["w101"] not in tokenized[3]["chosen_ids"]


def test_rows_with_and_without_tools_meet_across_chunks(tmp_path: Path) -> None:
    loaded = load_preference_pairs(write_lines(tmp_path / "many.jsonl", *[PLAIN] * 1000, CALLED))
    assert loaded.column_names == ["prompt", "chosen", "rejected", "tools"]
    assert check_pair(loaded[999], "row 1000")["prompt"] == PLAIN["prompt"]
    assert loaded[999]["tools"] is None
    last = check_pair(loaded[1000], "row 1001")
    assert last["chosen"][0]["tool_calls"] == CALLED["chosen"][0]["tool_calls"], "a null in an argument is one"
    assert last["tools"] == TOOLS


def test_tools_may_be_text_and_none() -> None:
    expected = tokenize_pair(check_pair(CALLED, "row 1"), tokenizer(), "row 1")
    assert tokenize_pair(check_pair({**CALLED, "tools": json.dumps(TOOLS)}, "row 1"), tokenizer(), "row 1") == expected
    for nothing in (None, [], "[]", "null"):
        pair = check_pair({**PLAIN, "tools": nothing}, "row 1")
        assert pair == PLAIN


@pytest.mark.parametrize("name", ["thinking", "reasoning"])
def test_reasoning_reaches_a_template_that_calls_it_otherwise(name: str) -> None:
    answers = [said("assistant", "w3", **{key: "w20 w21"}) for key in ("reasoning_content", name)]
    expected, actual = (tokenize_pair({**PLAIN, "chosen": [answer]}, tokenizer(), "row 1") for answer in answers)
    assert actual == expected
    assert tokenizer().convert_tokens_to_ids("w101") in actual[1]


def test_text_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2", "image": None}]
    record = {**PLAIN, "prompt": [said("user", parts)]}
    assert check_pair(record, "row 1")["prompt"] == [said("user", "w1 w2")]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "number for tools": ({"tools": 3}, ", column 'tools': tools must be a list of objects, got int"),
    "tools that are no objects": (
        {"tools": [*TOOLS, "w7"]},
        ", column 'tools': tools must be a list of objects, but 2 is 'w7'",
    ),
    "tools that are no JSON": (
        {"tools": "[w7]"},
        ", column 'tools': tools is text, but no JSON: Expecting value at character 2",
    ),
    "options that are no object": (
        {"chat_template_kwargs": [1]},
        ", column 'chat_template_kwargs': expected an object, got list",
    ),
    "options of this package": (
        {"chat_template_kwargs": {"tokenize": True, "tools": []}},
        ", column 'chat_template_kwargs': tokenize, tools cannot be set for a row",
    ),
    "call that is no object": (
        {"chosen": [said("assistant", None, tool_calls=["w7"])]},
        ", column 'chosen', message 1: tool_calls must be a list of objects, but 1 is 'w7'",
    ),
    "neither content nor call": (
        {"chosen": [said("assistant", None, tool_calls=[])]},
        ", column 'chosen', message 1: content must be a string, got NoneType",
    ),
    "image": (
        {"prompt": [said("user", [{"type": "text", "text": "w1"}, {"type": "image"}])]},
        ", column 'prompt', message 1, part 2: only parts {type: text, text: ...} can be trained on, got 'image'",
    ),
    "strings with tools": (
        {"prompt": "w1", "chosen": "w2", "rejected": "w3", "tools": TOOLS},
        ", column 'tools': only conversations go through a chat template, but these are strings",
    ),
    "surrogate in tools": (
        {"tools": [{"name": "\ud800"}]},
        ", column 'tools': not valid Unicode: surrogates not allowed",
    ),
    "surrogate in a call": (
        {"chosen": [said("assistant", None, tool_calls=[call("\ud800", {})])]},
        ", column 'chosen', message 1: not valid Unicode: surrogates not allowed",
    ),
    "a tool's last word": (
        {"chosen": CALLED["chosen"][:2]},
        ", column 'chosen': the last message is not the assistant's, but 'tool'",
    ),
    "other questions": (
        {**{name: [*ASKED[:1], said("user", name), said("assistant", "w3")] for name in ("chosen", "rejected")}}
        | {"prompt": None},
        ", column 'chosen': chosen and rejected differ from message 2 on, which is not the assistant's, but 'user': "
        "they answer different prompts",
    ),
}


@pytest.mark.parametrize(("change", "problem"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_trained_on_is_named(change: dict[str, Any], problem: str) -> None:
    assert refusal({**PLAIN, **change}) == f"row 3{problem}"


def test_what_the_template_would_leave_out_is_refused() -> None:
    bare = make_tokenizer()
    for change, problem in (
        ({"tools": TOOLS}, ", column 'tools': the chat template has no place for tools"),
        (
            {"chosen": CALLED["chosen"]},
            ", column 'chosen', message 1: the chat template has no place for tool_calls",
        ),
        (
            {"rejected": [said("assistant", "w3", reasoning_content="w4")]},
            ", column 'rejected', message 1: the chat template has no place for reasoning_content",
        ),
    ):
        with pytest.raises(PreferenceDataError) as caught:
            tokenize_pair(check_pair({**PLAIN, **change}, "row 3"), bare, "row 3")
        assert str(caught.value) == f"row 3{problem}"
    # What says nothing may be left out, and a tokenizer without a template says so.
    kept = tokenize_pair(check_pair({**PLAIN, "prompt": [said("user", "w1", id=7, seen=True)]}, "r"), bare, "r")
    assert kept == tokenize_pair({**PLAIN, "prompt": [said("user", "w1")]}, bare, "r")
    with pytest.raises(PreferenceDataError, match="row 3: these are messages, and the tokenizer has no chat template"):
        tokenize_pair(PLAIN, make_tokenizer(None), "row 3")


def test_a_response_of_several_turns_is_all_that_follows_the_prompt() -> None:
    whole = {column: CALLED["prompt"] + CALLED[column] for column in ("chosen", "rejected")}
    assert check_pair({**whole, "tools": TOOLS}, "row 1") == CALLED
    _, chosen, rejected = tokenize_pair(check_pair(CALLED, "row 1"), tokenizer(), "row 1")
    scored = tokenizer().convert_ids_to_tokens(chosen)
    assert scored.count("<|assistant|>") == 1, "the first one is the prompt's"
    assert " ".join(scored[scored.index("<|user|>") :]) == "<|user|> w5 <|end|> <|assistant|> w3 w4 <|end|>"
    assert tokenizer().convert_ids_to_tokens(rejected) == ["w6", "<|end|>"]
    # One that goes on where the other ends keeps a message of each.
    longer = [*whole["rejected"], said("user", "w8"), said("assistant", "w9")]
    pair = check_pair({"chosen": longer, "rejected": whole["rejected"]}, "row 1")
    assert (pair["prompt"], len(pair["chosen"]), len(pair["rejected"])) == (ASKED, 3, 1)


@pytest.mark.parametrize("implicit", [False, True], ids=["prompt", "no prompt"])
def test_token_ids_are_those_of_trl(implicit: bool) -> None:
    from trl import DPOConfig, DPOTrainer

    # Without a null, which Arrow cannot tell from a key that is not there.
    answer = [{**CALLED["chosen"][0], "tool_calls": [call("w7", {"a": 1})]}, *CALLED["chosen"][1:]]
    second = {**PLAIN, "prompt": ASKED, "rejected": answer, "tools": None}
    rows = [{**CALLED, "chosen": answer}, second, {**second, "rejected": PLAIN["rejected"]}]
    if implicit:
        rows = [
            {"tools": row["tools"]} | {column: row["prompt"] + row[column] for column in ("chosen", "rejected")}
            for row in rows
        ]
    text = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    dataset = datasets.Dataset.from_list([{**row, "chat_template_kwargs": {"style": "terse"}} for row in text])
    trainer = SimpleNamespace(_tokenizer=tokenizer())
    theirs = DPOTrainer._prepare_dataset(trainer, dataset, tokenizer(), DPOConfig(report_to=[], use_cpu=True), "train")
    ours = tokenize_dataset(dataset, tokenizer(), **LENGTHS)
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[column][:] == theirs[column][:], column


def test_a_single_completion_may_have_several_turns_beside_its_prompt() -> None:
    record = {"prompt": ASKED, "completion": CALLED["chosen"], "label": True, "tools": TOOLS}
    assert check_pair(record, "row 1") == record
    ids = tokenize_pair(check_pair(record, "row 1"), tokenizer(), "row 1")
    assert ids == tokenize_pair(check_pair(CALLED, "row 1"), tokenizer(), "row 1")[:2]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("w1 w2 w3", "w1 w2 w4", "w1 w2"),
        ("w1 w25", "w1 w26", "w1"),  # no word is torn
        ("Q: w1\nA: w2", "Q: w1\nA: w3", "Q: w1\nA:"),
        ("Q: w1\nw2", "Q: w1\nw3", "Q: w1\n"),
        ("Q: w1\n\nw2", "Q: w1\nw3", "Q: w1\n"),
        ("w1 w2", "w1 w2 w3", "w1"),  # each response keeps a word
        ("w1 w2", "w1 w2", "w1"),
        ("w1\n\nw2 w3", "w1\n\nw2", "w1\n\n"),
        ("w1 \tw2", "w1\t w3", "w1"),
    ],
)
def test_strings_share_their_prompt(chosen: str, rejected: str, prompt: str) -> None:
    assert split_strings(chosen, rejected, "row 1") == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    assert split_strings(rejected, chosen, "row 1")[0] == prompt
    record = check_pair({"chosen": chosen, "rejected": rejected}, "row 1")
    assert record["prompt"] + record["chosen"] == chosen


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("w1 w2", "w3 w2"), ("w12", "w13"), ("\nw1", "\nw2"), (" w1", " w2"), ("w1 ", "w1 w2")]
)
def test_strings_that_share_no_prompt_are_named(chosen: str, rejected: str) -> None:
    with pytest.raises(PreferenceDataError, match=r"^row 3: column 'prompt' is missing, and chosen and rejected begin"):
        check_pair({"chosen": chosen, "rejected": rejected}, "row 3")
    with pytest.raises(PreferenceDataError, match=r"^row 3: column 'prompt' is missing"):
        check_pair({"completion": chosen, "label": True}, "row 3")


def test_tokens_do_not_cross_the_end_of_a_shared_prompt() -> None:
    prompt, chosen, rejected = tokenize_pair(
        check_pair({"chosen": "w1 w2 w3", "rejected": "w1 w2 w4"}, "row 1"), tokenizer(), "row 1"
    )
    assert tokenizer().convert_ids_to_tokens(prompt) == ["w1", "w2"]
    assert tokenizer().convert_ids_to_tokens(chosen) == ["w3", "</s>"]
    assert tokenizer().convert_ids_to_tokens(rejected) == ["w4", "</s>"]


def test_reference_log_probs_of_a_file_stay(tmp_path: Path) -> None:
    pair = {**PLAIN, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2}
    path = write_lines(tmp_path / "pairs.jsonl", pair)
    tokenized = tokenize_dataset(load_preference_pairs(path), tokenizer(), **LENGTHS)
    assert (tokenized["ref_chosen_logps"][0], tokenized["ref_rejected_logps"][0]) == (-1.5, -2.0)
    for broken, problem in (("-1", "got '-1'"), (float("nan"), "got nan"), (True, "got True")):
        path.write_text(json.dumps({**pair, "ref_chosen_logps": broken}))
        with pytest.raises(
            PreferenceDataError, match=f"line 1, column 'ref_chosen_logps': expected a number.*{problem}"
        ):
            load_preference_pairs(path)
    path.write_text(json.dumps(pair) + "\n" + json.dumps(PLAIN))
    with pytest.raises(PreferenceDataError, match="line 2: this record has prompt, chosen, rejected, but those before"):
        load_preference_pairs(path)


def test_a_number_in_arguments_that_are_text_does_not_become_infinite() -> None:
    calls = [call("w7", '{"a": 1e400}')]
    pair = {"prompt": ASKED, "chosen": [said("assistant", None, tool_calls=calls)], "rejected": "w3"}
    with pytest.raises(
        PreferenceDataError, match="call 1: arguments is text, but no JSON: the number 1e400 is too large"
    ):
        check_pair({**pair, "rejected": [said("assistant", "w3")]}, "row 1")


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ('{"content": "w9"}', "has content, and so has the message itself"),
        ('{"role": "user", "name": "w1"}', "has name, role, and so has the message itself"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice in one object"),
        ('{"a": {"b": 1e999}}', "the number 1e999 is too large to be read"),
        ("[" * 100_000 + "]" * 100_000, "objects or lists are nested too deeply"),
    ],
)
def test_other_keys_as_text_take_nothing_from_a_message(extra: str, problem: str) -> None:
    pair = {"prompt": ASKED, "chosen": [said("assistant", "w3", name="w2", extra=extra)]}
    with pytest.raises(PreferenceDataError, match="row 1, column 'chosen', message 1: extra") as caught:
        check_pair({**pair, "rejected": [said("assistant", "w4")]}, "row 1")
    assert problem in str(caught.value)


def test_an_extra_that_is_no_object_is_the_users_own() -> None:
    for extra in ("w5", "{w5}", "3", ["w5"]):
        pair = {
            "prompt": ASKED,
            "chosen": [said("assistant", "w3", extra=extra)],
            "rejected": [said("assistant", "w4")],
        }
        assert check_pair(pair, "row 1")["chosen"][0]["extra"] == extra
    pair["chosen"] = [said("assistant", "w3", extra='{"name": "w5"}', name=None)]
    assert check_pair(pair, "row 1")["chosen"] == [said("assistant", "w3", name="w5")]
