"""What users wrote is what is read: every form of files, directories and data sets, and every refusal by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from refusals import ASKED, LENGTHS, ONE_TURN, PLAIN, refusal, tokenising_refusal
from tiny_model import make_tokenizer, write_lines

from dil_kernels.data import PreferenceDataError, check_pair, load_preference_pairs
from dil_kernels.data.tokenization import tokenize_dataset

pytestmark = pytest.mark.usefixtures("datasets_cache")

# Says a null as w60, so that one that is lost shows in the tokens.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "{% for key, value in call.function.arguments.items() %} {{ key }} {{ 'w60' if value is none else value }} "
    "{% endfor %}{% endfor %}<|end|>{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"data": [PLAIN, PLAIN]}, indent=2),
        json.dumps({"data": [PLAIN, PLAIN]}),
        json.dumps({"version": "1.0", "rows": [PLAIN, PLAIN]}, indent=2),
        json.dumps([PLAIN, PLAIN], indent=2),
        json.dumps([PLAIN, PLAIN]),
        "\n".join(map(json.dumps, [PLAIN, PLAIN])),
    ],
    ids=["data", "data on one line", "rows", "array", "array on one line", "lines"],
)
@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
def test_json_may_be_laid_out_in_any_way(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / name).write_text(text)
    assert load_preference_pairs(tmp_path / name).to_list() == [PLAIN, PLAIN]
    (tmp_path / name).write_text(json.dumps(PLAIN, indent=1))
    assert load_preference_pairs(tmp_path / name).to_list() == [PLAIN]


def test_an_error_in_json_over_several_lines_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text('{"data": [\n{"prompt": "w1"},\n{"prompt" 2}]}')
    assert refusal(path) == f"{path}, line 3: broken JSON at character 11: Expecting ':' delimiter"
    path.write_text('{\n "prompt": "w1",\n "chosen" "w2"\n}')
    assert refusal(path) == f"{path}, line 3: broken JSON at character 11: Expecting ':' delimiter"
    path.write_text('{"prompt": "w1", \n' + json.dumps(PLAIN))
    assert refusal(path) == (
        f"{path}, line 1: broken JSON at character 18: Expecting property name enclosed in double quotes"
    )
    path.write_text(json.dumps({"data": [PLAIN, {**PLAIN, "chosen": ""}]}, indent=1))
    assert refusal(path) == f"{path}, row 2, column 'chosen': the response is empty"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            '{"prompt": "w1", "chosen": "w2", "rejected": "w3", "chosen": "w4"}',
            "the key 'chosen' stands twice in one object, and only one value would be read",
        ),
        (
            '{"prompt": "w1", "chosen": [{"role": "assistant", "role": "user", "content": "w2"}], "rejected": "w3"}',
            "the key 'role' stands twice in one object, and only one value would be read",
        ),
        (
            '{"prompt": "w1", "chosen": "w2", "rejected": "w3", "id": ' + "1" * 5000 + "}",
            "a number of 5,000 digits (111111111111...) cannot be read",
        ),
        (
            '{"prompt": "w1", "chosen": "w2", "rejected": "w3", "id": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "objects or lists are nested too deeply",
        ),
        (
            '{"prompt": "w1", "chosen": "w2", "rejected": "w3", "id": 1e400}',
            "the number 1e400 is too large to be read",
        ),
        (
            '{"prompt": "w1", "chosen": "w2", "rejected": "w3", "id": [0.0, -0e5, -0.05e-400]}',
            "the number -0.05e-400 is too small to be read",
        ),
    ],
    ids=["key twice", "key twice in a message", "digits", "nesting", "large", "small"],
)
def test_json_that_would_lose_a_value_or_cannot_be_read_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PLAIN) + "\n" + line + "\n")
    assert refusal(path) == f"{path}, line 2: {problem}"
    directory = tmp_path / "set"
    directory.mkdir()
    path.rename(directory / "train.jsonl")
    assert refusal(directory) == f"{directory / 'train.jsonl'}, line 2: {problem}"


def test_a_number_that_is_no_float_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", {**PLAIN, "ref_chosen_logps": 10**400})
    assert "line 1, column 'ref_chosen_logps': expected a number" in refusal(path)
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,ref_chosen_logps,ref_rejected_logps\np,c,r,-1_0,-1\n")  # a float to Python
    assert "column 'ref_chosen_logps': expected a number" in refusal(path)


@pytest.mark.parametrize("form", ["pairs.jsonl", "pairs.csv", "data set"])
def test_a_reference_log_prob_beyond_float32_is_named(tmp_path: Path, form: str) -> None:
    row = {**PLAIN, "ref_chosen_logps": -1e39, "ref_rejected_logps": -1.0}
    path = tmp_path / form
    if form == "data set":
        message = tokenising_refusal(datasets.Dataset.from_list([row]))
    elif form == "pairs.csv":
        path.write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
        message = refusal(path)
    else:
        message = refusal(write_lines(path, row))
    assert message.endswith("column 'ref_chosen_logps': -1e+39 is beyond the range of float32")
    largest = torch.finfo(torch.float32).max
    loaded = load_preference_pairs(write_lines(tmp_path / "largest.jsonl", {**row, "ref_chosen_logps": -largest}))
    assert loaded["ref_chosen_logps"][:] == [-largest]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("text", [json.dumps(PLAIN) + "\n" + json.dumps(PLAIN), json.dumps([PLAIN], indent=1)])
def test_another_encoding_is_named(tmp_path: Path, encoding: str, text: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_bytes(text.encode(encoding))
    assert refusal(path).startswith(f"{path}")
    assert refusal(path).endswith(f": expected UTF-8, got {encoding[:6].upper()}")


def called(arguments: dict[str, Any]) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "w7", "arguments": arguments}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {**ONE_TURN, "chosen": [answer, {"role": "assistant", "content": "w3"}]}


@pytest.mark.parametrize(
    "form", ["pairs.jsonl", "directory", "Json() features", "Json() in Parquet", "JSON text in Parquet", "no features"]
)
def test_nulls_survive_every_way_in_that_can_hold_them(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [called({"w50": None, "w51": "w1"}), called({"w50": "w8", "w51": "w2"})]
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    with_calls = [{**message, "tool_calls": datasets.List(datasets.Json())}]
    features = datasets.Features({"prompt": [message], "chosen": with_calls, "rejected": [message]})
    source: Any = tmp_path / "pairs.parquet"
    if form == "pairs.jsonl":
        source = write_lines(tmp_path / "pairs.jsonl", *rows)
    elif form == "directory":
        source = write_lines(tmp_path / "set" / "train.jsonl", *rows).parent
    elif form == "Json() in Parquet":
        datasets.Dataset.from_list(rows, features=features).to_parquet(source)
    elif form == "JSON text in Parquet":
        text = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
        datasets.Dataset.from_list(text).to_parquet(source)
    given = datasets.Dataset.from_list(rows, features=None if form == "no features" else features)
    dataset = load_preference_pairs(source) if "features" not in form else given
    tokenizer = make_tokenizer(TEMPLATE)
    ids = tokenize_dataset(dataset, tokenizer, **LENGTHS)["chosen_ids"][0]
    said = " ".join(tokenizer.convert_ids_to_tokens(ids)).split(" <|end|>")[0]
    if form == "no features":  # where Arrow cannot tell, it is said
        assert said == "w51 w1"
        assert any("nulls at chosen.tool_calls.function.arguments.w50 are left out" in m for m in caplog.messages)
    else:
        assert said == "w50 w60 w51 w1"
        assert not any("nulls at" in message for message in caplog.messages)


def test_a_null_key_of_a_message_says_no_more_than_none() -> None:
    answer = [{"role": "assistant", "content": "w3", "tool_calls": None, "name": None}]
    assert check_pair({**ONE_TURN, "chosen": answer}, "row 1") == ONE_TURN


def test_sharegpt_messages_are_read(tmp_path: Path) -> None:
    record = {
        "prompt": [{"from": "system", "value": "w9"}, {"from": "human", "value": "w1"}],
        "chosen": [{"from": "gpt", "value": "w3"}],
        "rejected": [{"from": "gpt", "value": "w4"}],
    }
    expected = {**ONE_TURN, "prompt": [{"role": "system", "content": "w9"}, *ASKED]}
    assert load_preference_pairs(write_lines(tmp_path / "pairs.jsonl", record)).to_list() == [expected]
    datasets.Dataset.from_list([record]).to_parquet(tmp_path / "pairs.parquet")
    loaded = load_preference_pairs(tmp_path / "pairs.parquet")
    assert [check_pair(row, "row 1") for row in loaded] == [expected]
    with pytest.raises(
        PreferenceDataError, match=r"message 1: from must be one of human, gpt, .*, got 'function_call'"
    ):
        check_pair({**record, "chosen": [{"from": "function_call", "value": "{}"}]}, "row 1")
    with pytest.raises(PreferenceDataError, match=r"message 1: from must be one of .*, got \['gpt'\]"):
        check_pair({**record, "chosen": [{"from": ["gpt"], "value": "w3"}]}, "row 1")


@pytest.mark.parametrize("form", ["pairs.jsonl", "pairs.parquet", "directory", "data set"])
def test_messages_that_are_json_text_are_read_as_messages(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    named = {**ONE_TURN, "prompt": [{**ASKED[0], "name": "w2"}]}
    rows = [{name: json.dumps(value) for name, value in pair.items()} for pair in (ONE_TURN, named)]
    source = tmp_path / ("set" if form == "directory" else form)
    if form == "pairs.jsonl":
        write_lines(source, *rows)
    elif form == "data set":
        tokenizer = make_tokenizer()
        one, other = (
            tokenize_dataset(datasets.Dataset.from_list(pairs), tokenizer, **LENGTHS)
            for pairs in (rows[:1], [ONE_TURN])
        )
        assert one.to_list() == other.to_list()
        assert caplog.messages == ["the data: read as messages, since it is JSON text of such: chosen, rejected"]
        return
    else:
        source.mkdir(exist_ok=True) if form == "directory" else None
        datasets.Dataset.from_list(rows).to_parquet(source / "train.parquet" if form == "directory" else source)
    assert [check_pair(row, "row") for row in load_preference_pairs(source)] == [ONE_TURN, named]
    assert caplog.messages == [f"{source}: read as messages, since it is JSON text of such: chosen, rejected"]


@pytest.mark.parametrize(
    "text",
    [
        '[{"value": 3}]',
        '[{"content": "w3", "title": "w4"}]',
        '[{"from": "w3", "to": "w4"}]',
        "[{'value': 3}]",
        '[{"role": "w3", "rights": 1}] is what?',
        '[{"role": "user", "content": "w3"}] is what?',
        '[{"value": 3}, ...]',
    ],
)
def test_lists_of_other_objects_are_text(text: str) -> None:
    for name in ("prompt", "chosen", "rejected"):
        pair = {"prompt": "w1", "chosen": "w2", "rejected": "w3", name: text}
        assert check_pair(pair, "row") == pair


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"chosen": "[{'role': 'assistant', 'content': 'w3'}]"},  # as Python prints it
            ", column 'chosen': the list of messages is text, but no JSON: Expecting property name enclosed in double "
            "quotes at character 3",
        ),
        (
            {"chosen": json.dumps([*ONE_TURN["chosen"], 3])},
            ", column 'chosen', message 2: expected {role, content}, got 3",
        ),
        (
            {"prompt": json.dumps(ASKED), "chosen": "w3", "rejected": "w4"},
            ", column 'prompt': expected a string, got list",
        ),
        ({"rejected": "w4"}, ", column 'rejected': expected a list of messages, as in 'prompt', got str"),
        (
            {"prompt": None, "rejected": "w4"},
            ", column 'rejected': expected a list of messages, as in 'chosen', got str",
        ),
        ({"prompt": "w1", "rejected": "w4"}, ", column 'chosen': expected a string, got list"),
    ],
)
def test_the_column_that_differs_is_blamed(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(PreferenceDataError) as caught:
        check_pair({**ONE_TURN, **change}, "row 3")
    assert str(caught.value) == f"row 3{problem}"


def test_text_that_only_resembles_messages_stays() -> None:
    for text in ('["w1", "w2"]', '[{"name": "w1"}]', '{"role": "user", "content": "w1"}', "[w1]"):
        pair = {**PLAIN, "chosen": text}
        assert check_pair(pair, "row 1") == pair


def test_parts_of_the_splits_of_a_directory(tmp_path: Path) -> None:
    rows = [{**PLAIN, "chosen": f"w{i}"} for i in range(10)]
    write_lines(tmp_path / "set" / "train.jsonl", *rows[:8])
    directory = write_lines(tmp_path / "set" / "test.jsonl", *rows[8:]).parent
    for split, expected in (("train", rows[:8]), ("test+train[:25%]", rows[8:] + rows[:2]), ("train[-3:]", rows[5:8])):
        assert load_preference_pairs(directory, split=split).to_list() == expected
    assert refusal(directory, split="dev") == f"{directory}: has no split 'dev'; it has train, test"
    write_lines(directory / "test.jsonl", {**PLAIN, "chosen": ""})
    assert len(load_preference_pairs(directory)) == 8, "the other split is not read"


def test_text_of_a_directory_is_not_given_another_type(tmp_path: Path) -> None:
    dates = {"prompt": "2024-01-01", "chosen": "2024-01-02T00:00:00", "rejected": "2024-01-03 10:00:00"}
    directory = write_lines(tmp_path / "set" / "train.jsonl", dates, dates).parent
    assert load_preference_pairs(directory).to_list() == [dates, dates]


@pytest.mark.parametrize("separator", ["tab", ";", "; with comments"])
def test_text_of_tables_with_another_separator_is_text(tmp_path: Path, separator: str) -> None:
    """As a directory's .tsv, or as its README says: texts that pandas takes for missing or for numbers."""
    rows = [("NA", "the cat sat", "the cat ran"), ("", "w1, w2", "None"), ("1.50", "007", "null")]
    rows = rows[:2] if "comments" in separator else rows  # left to pandas, which names columns of numbers
    directory = tmp_path / "set"
    directory.mkdir()
    sign = "\t" if separator == "tab" else ";"
    lines = [sign.join(cells) for cells in [("prompt", "chosen", "rejected"), *rows]]
    (directory / ("x.tsv" if separator == "tab" else "x.csv")).write_text("\n".join(lines) + "\n")
    if sign == ";":
        options = '  sep: ";"\n' + ('  comment: "#"\n' if "comments" in separator else "")
        (directory / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files: x.csv\n{options}---\n"
        )
    expected = [dict(zip(("prompt", "chosen", "rejected"), cells, strict=True)) for cells in rows]
    assert load_preference_pairs(directory).to_list() == expected


def test_files_of_a_directory_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "set"
    for name in ("train.jsonl", "test.jsonl", "other.jsonl", "more/pairs.jsonl"):
        write_lines(directory / name, PLAIN)
    for name in ("dataset_info.json", "more/state.json", "more/.checkpoints/x.jsonl"):  # no data
        write_lines(directory / name, PLAIN)
    (directory / "more" / "x.csv").write_text("prompt,chosen,rejected\n")
    assert len(load_preference_pairs(directory)) == 1
    unread = "more/pairs.jsonl, more/x.csv, other.jsonl"
    assert caplog.messages == [f"{directory}: not read, since `datasets` takes others for the data: {unread}"]
    caplog.clear()
    assert len(load_preference_pairs(directory, data_files="other.jsonl")) == 1
    assert caplog.messages == []
    snapshot = tmp_path / "snapshots" / "1"  # as in the cache of the hub
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to(directory / "train.jsonl")
    assert len(load_preference_pairs(snapshot)) == 1
    assert caplog.messages == []


def test_data_without_a_name_are_refused() -> None:
    assert refusal("") == "the name of the data is empty"
