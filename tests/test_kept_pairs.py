"""Pairs that are kept on disk: read once, the same as before, read again when anything changes, never in part."""

from __future__ import annotations

import gc
import gzip
import json
import os
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from file_modes import modes_hold
from refusals import CHAT, PLAIN, refusal, said
from tiny_model import make_tokenizer, write_lines

from dil_kernels.data import PreferenceDataError, files, kept_pairs, load_preference_pairs, loading
from dil_kernels.data.cache_key import file_digest
from dil_kernels.data.tokenization import tokenize_dataset
from dil_kernels.training.ref_cache import CacheEntry
from dil_kernels.user_cache import scratch_beside

CALL = {"type": "function", "function": {"name": "w7", "arguments": {"w1": None}}}
CALLED = {**CHAT, "chosen": [said("assistant", None, tool_calls=[CALL]), said("assistant", "w3")]}
WITH_TOOLS = {**CHAT, "tools": [{"name": "w8"}]}


@pytest.fixture
def cache(tmp_path: Path, datasets_cache: None) -> Path:
    return tmp_path / "cache" / "dil_kernels"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of the records that are read."""
    places: list[str] = []
    check = loading.check_pair

    def noted(record: Any, where: str, like: Any = None) -> Any:
        places.append(where)
        return check(record, where, like)

    monkeypatch.setattr(loading, "check_pair", noted)
    return places


def test_a_file_is_read_once(tmp_path: Path, cache: Path, reads: list[str], caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", PLAIN, {**PLAIN, "score": 1})
    for _ in range(2):
        caplog.clear()
        loaded = load_preference_pairs(path)
        assert loaded.to_list() == [PLAIN, PLAIN]
        assert caplog.messages == [f"{path}: not used: column 'score'"], "said each time"
    assert reads == [f"{path}, line 1", f"{path}, line 2"]
    assert [Path(file["filename"]).parent.parent for file in loaded.cache_files] == [cache]
    assert not [left for left in cache.iterdir() if left.name.startswith(".")]


@pytest.mark.parametrize("change", ["content", "code", "damage", "cut", "{}", "[]", '{"digest": "DIGEST"}'])
def test_it_is_read_again_when_something_changes(
    tmp_path: Path,
    cache: Path,
    reads: list[str],
    change: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", PLAIN, PLAIN)
    kept = Path(load_preference_pairs(path).cache_files[0]["filename"])
    stat = path.stat()
    if change == "content":  # of the same size and time
        path.write_text(path.read_text().replace("w5", "w6"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "code":
        monkeypatch.setattr(kept_pairs, "code_key", lambda: "other")
    elif change == "damage":
        kept.write_bytes(kept.read_bytes().replace(b"w5", b"w9"))
    elif change == "cut":
        kept.write_bytes(kept.read_bytes()[:-100])
    else:
        kept.with_name(kept_pairs.ABOUT_NAME).write_text(change.replace("DIGEST", file_digest(kept)))
    rows = load_preference_pairs(path).to_list()
    assert rows == [{**PLAIN, "rejected": "w6"} if change == "content" else PLAIN] * 2
    assert len(reads) == 4
    assert len(caplog.messages) == (change not in ("content", "code")), "said once"


@pytest.mark.parametrize("form", ["set", "lines in an array"])
def test_sets_and_arrays_are_kept_too(tmp_path: Path, cache: Path, reads: list[str], form: str) -> None:
    if form == "set":
        source = write_lines(tmp_path / "set" / "train.jsonl", PLAIN, PLAIN).parent
        write_lines(source / "test.jsonl", CHAT)
    else:
        source = tmp_path / "pairs.json"
        source.write_text(json.dumps([PLAIN, PLAIN]))
    for _ in range(2):
        assert load_preference_pairs(source).to_list() == [PLAIN, PLAIN]
    assert len(reads) == 2
    if form == "set":
        assert load_preference_pairs(source, split="test").to_list() == [CHAT]
        assert load_preference_pairs(source, split="train[1:]").to_list() == [PLAIN]
        write_lines(source / "train.jsonl", PLAIN)
        assert load_preference_pairs(source).to_list() == [PLAIN]


def test_what_only_later_rows_have_finds_room(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "ROWS_PER_CHUNK", 2)
    rows = [CHAT, CHAT, CHAT, CALLED, CHAT, WITH_TOOLS, CHAT]
    loaded = load_preference_pairs(write_lines(tmp_path / "pairs.jsonl", *rows))
    alone = [load_preference_pairs(write_lines(tmp_path / f"{n}.jsonl", row))[0] for n, row in enumerate(rows)]
    assert loaded.column_names == ["prompt", "chosen", "rejected", "tools"]
    for row, expected in zip(loaded, alone, strict=True):
        assert row["tools"] == expected.get("tools")
        for name in ("prompt", "chosen", "rejected"):
            assert row[name] == [{"extra": None, **message} for message in expected[name]]
    assert loaded.features == datasets.Dataset.from_file(loaded.cache_files[0]["filename"]).features


@pytest.mark.parametrize("size", [1, 3])
def test_long_rows_are_written_a_few_at_a_time(
    tmp_path: Path, cache: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "CHARACTERS_PER_CHUNK", 16 * size - 1)  # a row has 16
    rows = [{**PLAIN, "chosen": "w1 w2 w3", "rejected": f"w{n}"} for n in range(9)]
    loaded = load_preference_pairs(write_lines(tmp_path / "pairs.jsonl", *rows))
    assert loaded.to_list() == rows
    assert [len(chunk) for chunk in loaded.data.column("prompt").chunks] == [size] * (9 // size)


@pytest.mark.parametrize("problem", ["no directory", "disk full"])
def test_where_nothing_can_be_kept_pairs_are_held_in_memory(
    tmp_path: Path, cache: Path, problem: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "ROWS_PER_CHUNK", 2)
    path = write_lines(tmp_path / "pairs.jsonl", *[CHAT] * 3, {**CALLED, "score": 1})
    if problem == "no directory":
        cache.parent.mkdir()
        cache.write_text("")
    else:
        write = kept_pairs._PairWriter.write

        def full(self: Any, pairs: Any) -> None:
            if len(pairs) == 2 and self._schema is not None:
                raise OSError(28, "No space left on device")
            write(self, pairs)

        monkeypatch.setattr(kept_pairs._PairWriter, "write", full)
    loaded = load_preference_pairs(path)
    assert [row["chosen"][-1]["content"] for row in loaded] == ["w3 w4"] * 3 + ["w3"]
    assert not loaded.cache_files
    held, unused = caplog.messages
    assert held.startswith(f"{path}: held in memory, since it cannot be kept in {cache}")
    assert unused == f"{path}: not used: column 'score'"
    if problem == "disk full":
        assert [left.suffix for left in cache.iterdir()] == [".lock"]


def test_nothing_is_kept_of_a_broken_file_or_one_that_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", PLAIN, {**PLAIN, "chosen": ""})
    assert refusal(path) == f"{path}, line 2, column 'chosen': the response is empty"
    assert gc.isenabled()
    path = write_lines(tmp_path / "growing.jsonl", PLAIN, PLAIN)
    check = loading.check_pair

    def growing(record: Any, where: str, like: Any = None) -> Any:
        with path.open("a") as file:
            file.write("\n")
        return check(record, where, like)

    monkeypatch.setattr(loading, "check_pair", growing)
    assert refusal(path) == f"{path}: it changed while it was read; read it again when it is complete"
    assert {left.suffix for left in cache.iterdir()} == {".lock"}


@pytest.mark.parametrize("way", ["another in its place", "written to, with its time set back", "a hard link"])
def test_a_file_that_changes_within_its_size_and_time_is_seen(
    tmp_path: Path, cache: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", PLAIN, PLAIN)
    check = loading.check_pair

    def changing(record: Any, where: str, like: Any = None) -> Any:
        stat, text = path.stat(), path.read_text().replace("w5", "w6")
        if way.startswith("another"):
            path.with_name("new").write_text(text)
            path.with_name("new").replace(path)
        elif way.startswith("written"):
            path.write_text(text)
        elif not path.with_name("link").exists():
            path.with_name("link").hardlink_to(path)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return check(record, where, like)

    monkeypatch.setattr(loading, "check_pair", changing)
    if way == "a hard link":
        assert load_preference_pairs(path).to_list() == [PLAIN, PLAIN], "its content is the same"
    else:
        assert refusal(path) == f"{path}: it changed while it was read; read it again when it is complete"


def test_what_killed_writers_left_of_reference_log_probs_is_removed_once_it_is_old(tmp_path: Path) -> None:
    entry = CacheEntry(tmp_path / f"{'0' * 32}.safetensors", "{}", np.ones((2, 1), np.int64))
    old, new = (scratch_beside(entry.path) for _ in range(2))
    for path in (old, new):
        path.write_text("")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    assert entry.store(np.zeros((2, 1), np.float32)) is None
    assert {*tmp_path.iterdir()} == {new, entry.path}


def test_what_killed_writers_left_is_removed_once_it_is_old(tmp_path: Path, cache: Path) -> None:
    kept = Path(load_preference_pairs(write_lines(tmp_path / "pairs.jsonl", PLAIN)).cache_files[0]["filename"]).parent
    digest, writer, day = kept.name, "0" * 32, 86400
    made = {}
    for name, age in (
        (f".{digest}-{writer}/pairs.arrow", 2),
        (f".{writer}-{writer}/pairs.arrow", 2),
        (f".{writer}-{digest}/pairs.arrow", 0),  # of one that is at work
        (f".{writer}-notes/mine", 2),
        (f"{digest}/tmp_a1b2c3d", 2),  # as `datasets` writes rows
        (f"{digest}/tmp_a1b2c3e", 0),
        (f"{digest}/tmpnotes.txt", 2),
    ):
        path = cache / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        made[name] = path, time.time() - age * day
    for path, then in made.values():
        for each in (path, path.parent) if path.parent != kept else (path,):
            os.utime(each, (then, then))
    assert load_preference_pairs(write_lines(tmp_path / "others.jsonl", PLAIN)).to_list() == [PLAIN]
    assert [path.exists() for path, _ in made.values()] == [False, False, True, True, False, True, True]
    assert load_preference_pairs(tmp_path / "pairs.jsonl").to_list() == [PLAIN]


def test_pairs_that_another_user_keeps_to_himself_are_passed_over(tmp_path: Path, cache: Path) -> None:
    kept = Path(load_preference_pairs(write_lines(tmp_path / "pairs.jsonl", PLAIN)).cache_files[0]["filename"]).parent
    kept.chmod(0)
    try:
        with modes_hold():
            loaded = load_preference_pairs(write_lines(tmp_path / "others.jsonl", CHAT))
    finally:
        kept.chmod(0o700)
    assert Path(loaded.cache_files[0]["filename"]).parent.parent == cache


def test_without_caching_pairs_are_on_disk_until_the_process_ends(tmp_path: Path, cache: Path) -> None:
    datasets.disable_caching()
    try:
        loaded = load_preference_pairs(write_lines(tmp_path / "pairs.jsonl", PLAIN))
        assert loaded.to_list() == [PLAIN]
        assert cache not in Path(loaded.cache_files[0]["filename"]).parents
        assert not cache.exists()
    finally:
        datasets.enable_caching()


def test_tokenised_rows_of_a_file_are_kept_beside_its_pairs(tmp_path: Path, cache: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", PLAIN, PLAIN)
    lengths = {"max_length": None, "max_prompt_length": None, "truncation_mode": "keep_end"}
    for _ in range(2):
        tokenize_dataset(load_preference_pairs(path), make_tokenizer(), **lengths)
    assert len([*cache.rglob("cache-*.arrow")]) == 1
    shutil.rmtree(cache)
    assert load_preference_pairs(path).to_list() == [PLAIN, PLAIN]


@pytest.mark.parametrize("name", ["pairs.jsonl", "first.jsonl", "pairs.jsonl.gz", "pairs.csv", "one.json"])
def test_a_row_that_is_too_long_is_named_with_its_size(
    tmp_path: Path, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    path = tmp_path / name
    long = {**PLAIN, "chosen": "w1 " * 1000}
    if name == "pairs.csv":
        path.write_text(f"prompt,chosen,rejected\nw1,w2,w3\nw1,{long['chosen']},w3\n")
        assert refusal(path) == f"{path}, line 3: broken CSV: field larger than field limit (1000)"
        return
    if name == "one.json":
        path.write_text(json.dumps(long, indent=1))
        place, size = "line 1", path.stat().st_size
    else:
        write_lines(path, *[PLAIN] * (name != "first.jsonl"), long, PLAIN)
        place, size = "line 1" if name == "first.jsonl" else "line 2", len(json.dumps(long)) + 1
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(PreferenceDataError) as caught:
        load_preference_pairs(path)
    assert str(caught.value).startswith(f"{path}, {place}: {size:,} bytes, but a row may have at most 1,000;")


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zip"])
def test_a_compressed_file_of_a_directory_is_read_again_when_it_changes(
    tmp_path: Path, cache: Path, ending: str
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for prompt in ("old", "new, longer"):
        line = json.dumps({"prompt": prompt, "chosen": "yes", "rejected": "no"}).encode()
        if ending.endswith("gz"):
            (folder / f"train.{ending}").write_bytes(gzip.compress(line))
        else:
            with zipfile.ZipFile(folder / f"train.{ending}", "w") as archive:
                archive.writestr("train.jsonl", line)
        assert load_preference_pairs(folder)["prompt"][:] == [prompt]


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_file_of_a_directory_is_read_again_when_only_its_content_changes(
    tmp_path: Path, cache: Path, ending: str
) -> None:
    path = tmp_path / "set" / f"train.{ending}"
    path.parent.mkdir()
    for prompt in ("old", "new"):
        data = datasets.Dataset.from_list([{**PLAIN, "prompt": prompt}])
        {"parquet": data.to_parquet, "csv": data.to_csv, "jsonl": data.to_json}[ending](path)
        os.utime(path, (1000, 1000))
        assert load_preference_pairs(path.parent)["prompt"][:] == [prompt]


def test_columns_of_a_set_of_tables_are_named_once(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "set").mkdir()
    for number in range(2):
        data = datasets.Dataset.from_list([{**PLAIN, "prompt": f"w{number}", "id": number}])
        data.to_parquet(tmp_path / "set" / f"train-0000{number}-of-00002.parquet")
    for _ in range(2):
        caplog.clear()
        assert load_preference_pairs(tmp_path / "set")["prompt"][:] == ["w0", "w1"]
        assert caplog.messages == [f"{tmp_path / 'set'}: not used: column 'id'"]
