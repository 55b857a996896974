"""Preference pairs from files: every local format, and every refusal with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from refusals import CHAT, PLAIN, refusal, said
from tiny_model import write_lines

from dil_kernels.data import load_preference_pairs
from dil_kernels.data.files import FILE_SUFFIXES

pytestmark = pytest.mark.usefixtures("datasets_cache")


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
        return path
    if path.name.endswith("array.json"):
        path.write_text(json.dumps(records, indent=1))
        return path
    return write_lines(path, *records)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "array.json", "pairs.parquet"])
@pytest.mark.parametrize("record", [PLAIN, CHAT], ids=["plain", "conversational"])
def test_every_local_format_gives_the_same_pairs(tmp_path: Path, name: str, record: dict[str, Any]) -> None:
    other = {**record, "chosen": record["rejected"], "rejected": record["chosen"]}
    loaded = load_preference_pairs(write(tmp_path / name, [{**record, "score": 1.0}, {**other, "score": 2.0}]))
    assert loaded.column_names == ["prompt", "chosen", "rejected"]
    assert loaded.to_list() == [record, other]


def test_more_rows_than_a_chunk_keep_their_order(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "many.jsonl", *({**PLAIN, "chosen": f"w{i}"} for i in range(2500)))
    assert load_preference_pairs(path)["chosen"][:] == [f"w{i}" for i in range(2500)]


def test_blank_lines_and_a_byte_order_mark_are_no_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PLAIN).encode() + b"\n\n  \n" + json.dumps(PLAIN).encode())
    assert load_preference_pairs(path).to_list() == [PLAIN, PLAIN]


def test_a_directory_is_loaded_by_split(tmp_path: Path) -> None:
    directory = tmp_path / "set"
    directory.mkdir()
    write_lines(directory / "train.jsonl", {**CHAT, "id": 7})
    write_lines(directory / "test.jsonl", CHAT, CHAT)
    assert load_preference_pairs(directory).to_list() == [CHAT]
    assert load_preference_pairs(directory, split="test").to_list() == [CHAT, CHAT]
    broken = {**CHAT, "rejected": [said("assistant", " ")]}
    write_lines(directory / "train.jsonl", CHAT, broken)
    assert refusal(directory) == f"{directory / 'train.jsonl'}, line 2, column 'rejected': the response is empty"


def test_whole_conversations_share_the_prompt(tmp_path: Path) -> None:
    whole = {column: CHAT["prompt"] + CHAT[column] for column in ("chosen", "rejected")}
    path = tmp_path / "pairs.jsonl"
    for prompt in ({}, {"prompt": "w1 w2"}, {"prompt": None}):
        assert load_preference_pairs(write_lines(path, {**prompt, **whole})).to_list() == [CHAT]
    answers = {column: CHAT[column] for column in ("chosen", "rejected")}
    loaded = load_preference_pairs(write_lines(path, {"prompt": "w1", **answers}))
    assert loaded.to_list() == [{"prompt": [said("user", "w1")], **answers}]


BROKEN = {
    "broken JSON": ('{"prompt": "w1", "chosen" "w2"}', ": broken JSON at character 27: Expecting ':' delimiter"),
    "cut line": ('{"prompt": "w1", "chosen": "w2', ": broken JSON at character 28: Unterminated string starting at"),
    "cut after a comma": (
        '{"prompt": "w1", ',
        ": broken JSON at character 18: Expecting property name enclosed in double quotes",
    ),
    "no object": ([1], ": expected an object with prompt, chosen, rejected, got list"),
    "missing chosen": (
        {"prompt": "w1", "rejected": "w2", "answer": "w3"},
        ": column 'chosen' is missing (columns with a value: prompt, rejected, answer)",
    ),
    "null rejected": (
        {**PLAIN, "rejected": None},
        ": column 'rejected' is missing (columns with a value: prompt, chosen)",
    ),
    "missing prompt": (
        {"chosen": "w1", "rejected": "w2"},
        ": column 'prompt' is missing, and chosen and rejected begin with no line or word in common",
    ),
    "number": ({**PLAIN, "rejected": 5}, ", column 'rejected': expected a string, got int"),
    "prompt of another kind": ({**PLAIN, "prompt": CHAT["prompt"]}, ", column 'prompt': expected a string, got list"),
    "responses of two kinds": ({**PLAIN, "chosen": CHAT["chosen"]}, ", column 'chosen': expected a string, got list"),
    "two numbers": (
        {"prompt": "w1", "chosen": 1, "rejected": 2},
        ", column 'chosen': expected a string or a list of {role, content} messages, got int",
    ),
    "empty response": ({**PLAIN, "chosen": ""}, ", column 'chosen': the response is empty"),
    "blank response": ({**PLAIN, "rejected": " \n"}, ", column 'rejected': the response is empty"),
    "surrogate": (
        '{"prompt": "w1", "chosen": "\\ud800", "rejected": "w2"}',
        ", column 'chosen': not valid Unicode: surrogates not allowed",
    ),
}
BROKEN_CHAT = {
    "empty list": ({**CHAT, "chosen": []}, ", column 'chosen': the list of messages is empty"),
    "empty prompt": ({**CHAT, "prompt": []}, ", column 'prompt': the list of messages is empty"),
    "number for prompt": (
        {**CHAT, "prompt": 3},
        ", column 'prompt': expected a string or a list of {role, content} messages, got int",
    ),
    "empty response": (
        {**CHAT, "rejected": [said("assistant", " ")]},
        ", column 'rejected': the response is empty",
    ),
    "no message": ({**CHAT, "chosen": ["w1"]}, ", column 'chosen', message 1: expected {role, content}, got 'w1'"),
    "no content": (
        {**CHAT, "prompt": [said("user", "w1"), {"role": "user"}]},
        ", column 'prompt', message 2: content must be a string, got NoneType",
    ),
    "role of another type": (
        {**CHAT, "rejected": [said(1, "w1")]},  # type: ignore[arg-type]
        ", column 'rejected', message 1: role must be a string, got int",
    ),
    "answer of the user": (
        {**CHAT, "chosen": [said("user", "w1")]},
        ", column 'chosen': the last message is not the assistant's, but 'user'",
    ),
    "prompt given twice": (
        {**CHAT, "chosen": CHAT["prompt"] + CHAT["chosen"]},
        ", column 'chosen': beside a prompt of messages, the response must begin with the assistant's message, not "
        "'system'; leave the prompt column out if the responses hold the whole conversation",
    ),
    "prompt nowhere": (
        {"chosen": CHAT["chosen"], "rejected": CHAT["rejected"]},
        ": column 'prompt' is missing, and the responses hold only the answer",
    ),
    "prompt under another name": (
        {"question": "w9", "chosen": CHAT["chosen"], "rejected": CHAT["rejected"]},
        ": column 'prompt' is missing, and the responses hold only the answer (columns with a value: question, chosen, "
        "rejected)",
    ),
    "two prompts": (
        {"chosen": CHAT["prompt"] + CHAT["chosen"], "rejected": CHAT["prompt"][1:] + CHAT["rejected"]},
        ": chosen and rejected share no message that could be the prompt",
    ),
    "another prompt": (
        {"prompt": "w7", **{column: CHAT["prompt"] + CHAT[column] for column in ("chosen", "rejected")}},
        ", column 'prompt': not a message of the conversation in chosen and rejected",
    ),
    "plain among conversations": (PLAIN, ": this pair is three strings, but those before it are lists of messages"),
}


@pytest.mark.parametrize(("broken", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named(tmp_path: Path, broken: Any, problem: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", PLAIN, "", broken, PLAIN)
    assert refusal(path) == f"{path}, line 3{problem}"


@pytest.mark.parametrize(("broken", "problem"), BROKEN_CHAT.values(), ids=BROKEN_CHAT)
def test_a_broken_conversation_is_named(tmp_path: Path, broken: Any, problem: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", CHAT, broken)
    assert refusal(path) == f"{path}, line 2{problem}"


def test_rows_of_other_formats_are_named(tmp_path: Path) -> None:
    records = [PLAIN, PLAIN, {**PLAIN, "chosen": ""}]
    for name in ("pairs.parquet", "array.json"):
        path = write(tmp_path / name, records)
        assert refusal(path) == f"{path}, row 3, column 'chosen': the response is empty"
    path = tmp_path / "array.json"
    path.write_text('[\n{"prompt": "w1"},\n{"prompt" 2}]')
    assert refusal(path) == f"{path}, line 3: broken JSON at character 11: Expecting ':' delimiter"


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", PLAIN)
    with path.open("ab") as file:
        file.write(b'{"prompt": "\xff\xfe"}\n')
    assert refusal(path) == f"{path}, line 2: not UTF-8: invalid start byte"


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    assert refusal(missing) == f"{missing}: no such file"
    other = write_lines(tmp_path / "pairs.txt", PLAIN)
    assert refusal(other) == f"{other}: unknown kind of file; expected {', '.join(FILE_SUFFIXES)}"
    empty = write_lines(tmp_path / "empty.jsonl", "")
    assert refusal(empty) == f"{empty}: holds no preference pair"
    table = tmp_path / "pairs.parquet"
    table.write_bytes(b"PAR1 and nothing more")
    assert refusal(table).startswith(f"{table}: broken Parquet file: ")
    pq.write_table(
        pa.table({**{k: [v] for k, v in PLAIN.items()}, "m": pa.array([{}], pa.map_("string", "int8"))}), table
    )
    assert refusal(table).startswith(f"{table}: a column has a type that `datasets` does not know: Arrow type map<")
    path = write_lines(tmp_path / "pairs.jsonl", PLAIN)
    assert refusal(path, split="test") == f"{path}: a local file has only the split 'train', not 'test'"
    directory = tmp_path / "nothing"
    directory.mkdir()
    assert refusal(directory).startswith(f"{directory}: not a local file, and loading it as a data set failed: ")
    write_lines(directory / "train.jsonl", PLAIN, '{"prompt": ')
    assert refusal(directory) == f"{directory / 'train.jsonl'}, line 2: broken JSON at character 12: Expecting value"
    (directory / "README.md").write_text(
        "---\nconfigs:\n" + "".join(f"- config_name: {name}\n  data_files: train.jsonl\n" for name in "ab") + "---\n"
    )
    assert "Config name is missing. Please pick one among the available configs: ['a', 'b']" in refusal(directory)
    (directory / "README.md").unlink()
    table = (directory / "train.jsonl").rename(directory / "train.parquet")
    assert refusal(directory).startswith(f"{table}: broken Parquet file: ")
    table.rename(directory / "train.arrow")
    assert refusal(directory).startswith(f"{directory}: not a local file, and loading it as a data set failed: ")
