"""Pairs in CSV and packed files, several data sets as one, and a part of them held out."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from refusals import refusal
from tiny_model import write_lines

from dil_kernels.data import PreferenceDataError, load_preference_pairs
from dil_kernels.data.mixture import DataSource, data_sources, load_mixture, split_off_test
from dil_kernels.data.pair_storage import source_of

pytestmark = pytest.mark.usefixtures("datasets_cache")

PLAIN = {"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}
# What readers of CSV take for numbers, nulls, quotes, or the end of a line.
TEXTS = ["None", "NA", "null", "1.0", "007", "true", 'a "b", c', "two\nlines\r\nthree", " blanks ", "é", "x" * 200_000]
CHAT = {"chosen": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
CHAT["rejected"] = [CHAT["chosen"][0], {"role": "assistant", "content": "w3"}]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def numbered(count: int, letter: str) -> list[dict[str, Any]]:
    return [{**PLAIN, "chosen": f"{letter}{number}"} for number in range(count)]


@pytest.mark.parametrize("place", ["pairs.csv", "pairs.csv.gz", "PAIRS.CSV", "set/train.csv", "set/train.csv.gz"])
def test_texts_of_csv_are_what_was_written(tmp_path: Path, place: str) -> None:
    rows = [{**PLAIN, "chosen": text, "rejected": f"not {text}"} for text in TEXTS]
    path = write_csv(tmp_path / place, rows)
    if place.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    source = path.parent if "/" in place else path
    assert load_preference_pairs(source).to_list() == rows


def test_labels_numbers_and_json_in_csv(tmp_path: Path) -> None:
    rows = [
        {"prompt": "w1 ", "completion": "w2", "label": label, "ref_logps": "-1.5"} for label in ("True", "false", 1, 0)
    ]
    found = load_preference_pairs(write_csv(tmp_path / "unpaired.csv", rows)).to_list()
    assert [(row["label"], row["ref_logps"]) for row in found] == [
        (True, -1.5),
        (False, -1.5),
        (True, -1.5),
        (False, -1.5),
    ]
    chat = {name: json.dumps(messages) for name, messages in CHAT.items()}
    rows = [{**chat, "chat_template_kwargs": value} for value in ('{"a": 1}', "")]
    found = load_preference_pairs(write_csv(tmp_path / "chat.csv", rows)).to_list()
    assert found[0]["prompt"] == CHAT["chosen"][:1]
    assert [row["chat_template_kwargs"] for row in found] == ['{"a": 1}', None]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prompt,chosen,rejected\nw1,w2\n", ", line 2: 2 cells, but the first line has 3"),
        ('prompt,chosen,rejected\nw1,"a\nb",w2\n\nw1,w2,w3,w4\n', ", line 5: 4 cells, but the first line has 3"),
        ("prompt,chosen,chosen\nw1,w2,w3\n", ": columns of the same name: chosen"),
        ("prompt;chosen;rejected\nw1;w2;w3\n", ", line 2: column 'chosen' is missing"),
        ('prompt,chosen,rejected\nw1,w2,w3\nw1,w2,"w3', ", line 3: broken CSV: unexpected end of data"),
        ('prompt,chosen,rejected\nw1,"w2"w,w3\n', ", line 2: broken CSV: ',' expected after '\"'"),
        ("prompt,chosen,rejected\nw1,,w3\n", ", line 2, column 'chosen': the response is empty"),
        ("prompt,completion,label\nw1,w2,maybe\n", ", line 2, column 'label': expected true or false, got str"),
        ("prompt,completion,label\nw1,w2,\n", ", line 2: column 'label' is missing"),
        ("prompt,chosen,rejected\n", ": holds no preference pair"),
        ("", ": holds no preference pair"),
    ],
)
def test_broken_csv_is_named_by_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    assert refusal(path).startswith(f"{path}{problem}")


def test_csv_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    for encoding in ("utf-16", "latin-1"):
        path.write_bytes("prompt,chosen,rejected\nw1,é,w3\n".encode(encoding))
        assert "not UTF-8" in refusal(path)


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.json.gz", "pairs.JSONL.GZ"])
def test_packed_json(tmp_path: Path, name: str) -> None:
    rows = numbered(3, "a")
    path = tmp_path / name
    text = "".join(json.dumps(row) + "\n" for row in rows) if "l.gz" in name.lower() else json.dumps(rows, indent=1)
    path.write_bytes(packed := gzip.compress(text.encode()))
    assert load_preference_pairs(path).to_list() == rows
    for broken in (packed[:-10], text.encode(), packed[:30] + b"\xff" * 20 + packed[50:]):
        path.write_bytes(broken)
        assert refusal(path).startswith(f"{path}: broken gzip file: ")
    path.write_bytes(gzip.compress(b'{"prompt": '))
    assert refusal(path).startswith(f"{path}, line 1: broken JSON")


def test_files_and_configurations_of_sets(tmp_path: Path) -> None:
    files = (
        write_lines(tmp_path / "one.jsonl", *numbered(2, "a")),
        write_lines(tmp_path / "two.jsonl", *numbered(3, "b")),
    )
    found = load_preference_pairs("json", data_files={"held": [str(file) for file in files]}, split="held")
    assert found["chosen"][:] == ["a0", "a1", "b0", "b1", "b2"]
    assert refusal(files[0], name="en") == f"{files[0]}: a local file has no name; got 'en'"
    configs = "- config_name: en\n  data_files: one.jsonl\n- config_name: de\n  data_files: two.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert len(load_preference_pairs(tmp_path, name="de")) == 3
    assert "Config name is missing" in refusal(tmp_path)


def test_a_mixture_has_all_rows_in_their_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", *numbered(2, "a"))
    write_csv(tmp_path / "b.csv", numbered(3, "b"))
    mixture = load_mixture(data_sources([{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.csv")}]))
    assert mixture.to_list() == [*numbered(2, "a"), *numbered(3, "b")]
    assert source_of(mixture) == f"{tmp_path / 'a.jsonl'} (rows 1 to 2) + {tmp_path / 'b.csv'} (rows 3 to 5)"


def test_fractions_are_shares_of_the_largest_mixture_without_repetition(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", *numbered(30, "a"))
    write_lines(tmp_path / "b.jsonl", *numbered(5, "b"))
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    mixture = load_mixture([DataSource(paths[0], fraction=3), DataSource(paths[1], fraction=1.0)])
    assert mixture.to_list() == [*numbered(15, "a"), *numbered(5, "b")]
    with pytest.raises(PreferenceDataError, match="entry 2 of datasets: no row is left by its fraction"):
        load_mixture([DataSource(paths[0], fraction=1e6), DataSource(paths[1], fraction=1)])


def test_sets_of_a_mixture_have_one_form(tmp_path: Path) -> None:
    plain = DataSource(str(write_lines(tmp_path / "a.jsonl", *numbered(2, "a"))))
    chat = DataSource(str(write_lines(tmp_path / "c.jsonl", CHAT)))
    with pytest.raises(PreferenceDataError, match=r"c.jsonl: this pair is lists of messages, but those before it"):
        load_mixture([plain, chat])
    scored = {**PLAIN, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    with pytest.raises(PreferenceDataError, match=r"s.jsonl: this record has prompt, chosen, rejected, ref_chosen"):
        load_mixture([plain, DataSource(str(write_lines(tmp_path / "s.jsonl", scored)))])


def test_optional_parts_of_one_set_of_a_mixture_stay(tmp_path: Path) -> None:
    named = {name: [{**messages[0], "name": "ann"}, messages[1]] for name, messages in CHAT.items()}
    first = DataSource(str(write_lines(tmp_path / "c.jsonl", *[CHAT] * 1001)))
    second = DataSource(
        str(write_lines(tmp_path / "d.jsonl", {**named, "chat_template_kwargs": {"a": 1}})),
    )
    mixture = load_mixture([first, second])
    assert len(mixture) == 1002
    assert mixture[1001]["chat_template_kwargs"] == '{"a": 1}'
    assert "ann" in str(mixture[1001]["prompt"])
    assert mixture[1000]["chat_template_kwargs"] is None
    assert mixture[1000]["prompt"][0]["content"] == "w1"


@pytest.mark.parametrize(("size", "held_out"), [(0.25, 5), (7, 7), (1, 1)])
def test_a_part_is_held_out_at_random(tmp_path: Path, size: float, held_out: int) -> None:
    rows = numbered(20, "a")
    dataset = load_preference_pairs(write_lines(tmp_path / "a.jsonl", *rows))
    train, test = split_off_test(dataset, size, seed=0)
    assert len(test) == held_out
    assert sorted([*train["chosen"][:], *test["chosen"][:]]) == sorted(row["chosen"] for row in rows)
    again = split_off_test(dataset, size, seed=0)
    assert again[1].to_list() == test.to_list()
    assert any(split_off_test(dataset, size, seed=seed)[1].to_list() != test.to_list() for seed in range(1, 5))
    assert source_of(train) == f"the training part of {tmp_path / 'a.jsonl'}"


@pytest.mark.parametrize("size", [0.001, 20, 21])
def test_a_part_that_leaves_nothing_is_refused(tmp_path: Path, size: float) -> None:
    dataset = load_preference_pairs(write_lines(tmp_path / "a.jsonl", *numbered(20, "a")))
    if size < 1:
        assert len(split_off_test(dataset, size, seed=0)[1]) == 1  # a share is rounded up
        return
    with pytest.raises(PreferenceDataError, match=rf"a.jsonl: test_split_size={size} of 20 rows leaves none to"):
        split_off_test(dataset, size, seed=0)
