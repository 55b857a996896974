"""Tables of preference data: their columns and formats, images, and rows that are kept on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import LENGTHS, ONE_TURN, PLAIN, refusal, tokenising_refusal, write_arrow
from tiny_model import CHAT_TEMPLATE, make_tokenizer, write_lines

from dil_kernels.cli import programs
from dil_kernels.data import PreferenceDataError, check_pair, load_preference_pairs, loading
from dil_kernels.data.cache_key import source_digest
from dil_kernels.data.tokenization import tokenize_dataset

pytestmark = pytest.mark.usefixtures("datasets_cache")

PICTURE = {"bytes": b"x", "path": None}


def test_columns_of_a_table_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    text = pa.array(["w1"])
    pq.write_table(pa.Table.from_arrays([text] * 4, names=["prompt", "chosen", "rejected", "chosen"]), path)
    assert refusal(path) == f"{path}: columns of the same name: chosen"
    datasets.Dataset.from_list([{"prompt": "w1", "chosen": "w2", "worse": "w3"}]).to_parquet(path)
    assert refusal(path) == f"{path}: column 'rejected' is missing (columns: prompt, chosen, worse)"
    pq.write_table(pa.table({"prompt": ["w1"], "chosen": [b"w2"], "rejected": [b"w3"]}), path)
    assert refusal(path).endswith(
        "row 1, column 'chosen': expected a string or a list of {role, content} messages, got bytes"
    )
    directory = tmp_path / "set"
    directory.mkdir()
    pq.write_table(pa.table({"question": ["w1"], "answer": ["w2"]}), directory / "train.parquet")
    assert refusal(directory) == f"{directory}/train.parquet: column 'chosen' is missing (columns: question, answer)"
    asked = datasets.Dataset.from_list([{"question": "w1", "answer": "w2"}])
    assert tokenising_refusal(asked) == "column 'chosen' is missing (columns: question, answer)"
    content = [{"role": "assistant", "content": b"w1"}]
    with pytest.raises(PreferenceDataError, match="message 1: content must be a string, got bytes"):
        check_pair({**ONE_TURN, "chosen": content}, "row 1")


@pytest.mark.parametrize("form", ["pairs.jsonl", "pairs.parquet", "directory", "data set"])
def test_columns_that_are_not_used_are_named_once(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**PLAIN, "system": "w7", "history": "w8", "label": True}] * 3
    source = tmp_path / ("set" if form == "directory" else form)
    if form == "pairs.parquet":
        datasets.Dataset.from_list(rows).to_parquet(source)
    elif form == "directory":
        write_lines(source / "train.jsonl", *rows)
    elif form == "pairs.jsonl":
        write_lines(source, *rows)
    if form == "data set":
        tokenize_dataset(datasets.Dataset.from_list(rows), make_tokenizer(), **LENGTHS)
        assert caplog.messages == ["the data: not used: columns 'system', 'history', 'label'"]
        return
    loaded = load_preference_pairs(source)
    assert caplog.messages == [f"{source}: not used: columns 'system', 'history', 'label'"]
    assert loaded.to_list() == [PLAIN] * 3
    caplog.clear()
    tokenize_dataset(loaded, make_tokenizer(), **LENGTHS)
    assert caplog.messages == []


@pytest.mark.parametrize("kind", ["pandas", "arrow", "numpy", "torch"])
def test_a_data_set_may_have_any_format(kind: str) -> None:
    tokenizer = make_tokenizer()
    for pair in (PLAIN, ONE_TURN):
        plain = datasets.Dataset.from_list([pair, pair])
        expected = tokenize_dataset(plain, tokenizer, **LENGTHS).to_list()
        assert tokenize_dataset(plain.with_format(kind), tokenizer, **LENGTHS).to_list() == expected


def test_a_transform_of_the_users_is_applied() -> None:
    tokenizer = make_tokenizer()
    raw = datasets.Dataset.from_list([{"question": "w1 w2 ", "good": "w3 w4", "bad": "w5"}])
    raw.set_transform(lambda batch: {"prompt": batch["question"], "chosen": batch["good"], "rejected": batch["bad"]})
    expected = tokenize_dataset(datasets.Dataset.from_list([PLAIN]), tokenizer, **LENGTHS)
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert tokenize_dataset(raw, tokenizer, **LENGTHS).select_columns(columns)[0] == expected.select_columns(columns)[0]


@pytest.mark.parametrize("pair", [PLAIN, ONE_TURN], ids=["strings", "messages"])
@pytest.mark.parametrize("name", ["image", "images"])
def test_columns_of_images_are_refused(tmp_path: Path, pair: dict[str, Any], name: str) -> None:
    problem = f"column {name!r} has images, video or sound, of which training sees nothing"
    value = ["a.png"] if name == "images" else "a.png"
    path = write_lines(tmp_path / "pairs.jsonl", pair, {**pair, name: value})
    assert refusal(path).startswith(f"{path}, line 2, {problem}")
    assert refusal(write_lines(tmp_path / "set" / "train.jsonl", {**pair, name: value}).parent).endswith(
        "remove the column if the text is meant to stand by itself"
    )
    picture = datasets.List(datasets.Image()) if name == "images" else datasets.Image()
    plain = datasets.Dataset.from_list([pair])
    table = plain.add_column(name, [[PICTURE] if name == "images" else PICTURE]).cast_column(name, picture)
    assert tokenising_refusal(table).startswith(problem)
    assert tokenising_refusal(table.rename_column(name, "photo")).startswith(problem.replace(name, "photo", 1))
    table.to_parquet(tmp_path / "pairs.parquet")
    assert refusal(tmp_path / "pairs.parquet").startswith(f"{tmp_path / 'pairs.parquet'}: {problem}")
    # A column of nothing loses nothing.
    none = plain.add_column(name, [[] if name == "images" else None])
    assert len(tokenize_dataset(none, make_tokenizer(), **LENGTHS)) == 1
    assert len(load_preference_pairs(write_lines(path, {**pair, name: []}))) == 1


def test_dil_train_refuses_columns_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", PLAIN, {**PLAIN, "images": ["a.png"]})
    make_tokenizer().save_pretrained(tmp_path / "model")
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    assert programs.main(["--model", model, "--train-file", str(path), "--output-dir", out]) == 2
    problem = f"dil-train: error: {path}, line 2, column 'images' has images, video or sound"
    assert capsys.readouterr().err.splitlines()[-1].startswith(problem)
    assert not (tmp_path / "out").exists()


def test_pictures_beside_the_text_of_a_part_are_refused() -> None:
    content = [{"type": "text", "text": "w1", "image": "a.png"}]
    with pytest.raises(PreferenceDataError, match="message 1, part 1: only text can be trained on, got image, too"):
        check_pair({**ONE_TURN, "prompt": [{"role": "user", "content": content}]}, "row 1")


def test_rows_of_two_kinds_in_a_data_set_are_named() -> None:
    rows = [{name: json.dumps(value) for name, value in ONE_TURN.items()}, PLAIN]
    message = tokenising_refusal(datasets.Dataset.from_list(rows))
    assert message == "row 2: this pair is three strings, but those before it are lists of messages"


def test_warnings_of_data_come_from_one_of_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", {**PLAIN, "system": "w7"})
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.INFO):
        load_preference_pairs(path)
    assert caplog.messages == []


def test_cached_rows_are_those_of_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "set"
    directory.mkdir()
    write_arrow(directory / "train.arrow", PLAIN)
    kept = []
    for key in ("one", "one", "other"):
        monkeypatch.setattr(loading, "code_key", lambda key=key: key)
        assert load_preference_pairs(directory).to_list() == [PLAIN]
        kept.append(len(list((tmp_path / "cache").rglob("cache-*.arrow"))))
    assert kept == [1, 1, 2]


def test_the_key_of_cached_rows_changes_with_the_code(tmp_path: Path) -> None:
    package = tmp_path / "dil_kernels"
    (package / "data").mkdir(parents=True)
    keys = set()
    for name in ("loading.py", "tokenization.py", "messages.py", "columns.py"):
        (package / "data" / name).write_text("one = 1\n")
        keys.add(source_digest(package))
        (package / "data" / name).write_text("one = 2\n")
        keys.add(source_digest(package))
    assert len(keys) == 8


@pytest.mark.parametrize("change", ["chat_template", "eos_token"])
def test_the_key_of_tokenised_rows_has_the_tokenizer(tmp_path: Path, change: str) -> None:
    directory = tmp_path / "set"
    directory.mkdir()
    datasets.Dataset.from_list([PLAIN if change == "eos_token" else ONE_TURN]).to_parquet(directory / "train.parquet")
    loaded = load_preference_pairs(directory)
    assert loaded.cache_files, "else nothing would be kept"
    before = tokenize_dataset(loaded, make_tokenizer(), **LENGTHS)["chosen_ids"][0]
    tokenizer = make_tokenizer()
    setattr(tokenizer, change, CHAT_TEMPLATE.replace("<|end|>", " w100 ") if change == "chat_template" else "w100")
    after = tokenize_dataset(loaded, tokenizer, **LENGTHS)["chosen_ids"][0]
    assert before[:-1] == after[:-1]
    assert after[-1] == tokenizer.convert_tokens_to_ids("w100") != before[-1]


@pytest.mark.parametrize("form", ["pairs.jsonl", "set"])
def test_faults_found_in_tokenising_name_the_file(tmp_path: Path, form: str) -> None:
    rows = [{**ONE_TURN, "tools": None}, {**ONE_TURN, "tools": json.dumps([{"name": "w7"}])}]
    source = tmp_path / form
    if form == "set":
        source.mkdir()
        datasets.Dataset.from_list(rows).to_parquet(source / "train.parquet")
    else:
        write_lines(source, *rows)
    loaded = load_preference_pairs(source)
    problem = "row 2, column 'tools': the chat template has no place for tools"
    assert tokenising_refusal(loaded) == f"{source}, {problem}"
    # Reordered rows are no longer those of the file.
    assert tokenising_refusal(loaded.select([0, 1, 0])) == problem
    assert tokenising_refusal(loaded.select([1, 0])) == problem.replace("2", "1")
