"""The benchmark of reading and tokenising: what it writes, what it measures, and that its peers are given the same."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from refusals import CHAT
from tiny_model import make_tokenizer, write_lines

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from bench_data import COLUMNS, PROVIDERS, main, measured, run, write_rows

from dil_kernels.data import load_preference_pairs

pytestmark = pytest.mark.usefixtures("datasets_cache")


def test_rows_are_as_many_as_wanted_and_distinct(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "few.jsonl", CHAT, CHAT)
    write_rows(source, tmp_path / "many.jsonl", 5)
    rows = [json.loads(line) for line in (tmp_path / "many.jsonl").read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in rows] == [f"({number}) w9" for number in range(5)]
    assert [{**row, "prompt": CHAT["prompt"]} for row in rows] == [CHAT] * 5


def test_memory_is_what_the_work_takes() -> None:
    held: list[bytes] = []
    before = measured(lambda: None)
    after = measured(lambda: held.append(bytes([1]) * 100_000_000))
    assert 90 < after["anon_mb"] - before["anon_mb"] < 130
    assert after["resident_mb"] >= after["anon_mb"]


@pytest.mark.parametrize(("what", "provider"), [(what, name) for what, names in PROVIDERS.items() for name in names])
def test_every_provider_does_its_work(tmp_path: Path, what: str, provider: str) -> None:
    if provider == "TRL":
        pytest.importorskip("trl")
    tokenizer = tmp_path / "tokenizer"
    make_tokenizer().save_pretrained(tokenizer)
    path = write_lines(tmp_path / "pairs.jsonl", CHAT, CHAT)
    found = PROVIDERS[what][provider](str(path), str(tokenizer))
    assert set(found) == {"seconds", "cpu_seconds", "anon_mb", "resident_mb"}
    assert found["seconds"] > 0


def test_measurements_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(what: str, provider: str, path: Path, tokenizer: str, cache: str) -> dict[str, float]:
        assert len(load_preference_pairs(path)) == 3
        return {"seconds": 2.0 if provider == "datasets" else 1.0, "cpu_seconds": 1, "anon_mb": 1, "resident_mb": 2}

    monkeypatch.setattr("bench_data.run", here)
    source = write_lines(tmp_path / "pairs.jsonl", CHAT)
    arguments = ["--pairs", str(source), "--only", "read", "--rows", "3", "--csv", str(tmp_path / "found.csv")]
    assert main(arguments) == 0
    rows = [*csv.DictReader((tmp_path / "found.csv").open())]
    assert tuple(rows[0]) == COLUMNS
    assert [(row["provider"], row["of_first"]) for row in rows] == [
        ("dil_kernels", "1.0"),
        ("dil_kernels again", "1.0"),
        ("datasets", "2.0"),
        ("datasets again", "2.0"),
    ]
    assert "datasets again" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--only", "read"])


def test_what_fails_is_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)read with dil_kernels: .*no such file"):
        run("read", "dil_kernels", tmp_path / "none.jsonl", "", str(tmp_path))
