"""Values that no option of dil-train can have: each is refused by name, before anything is loaded."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from dil_kernels import backends, cli
from dil_kernels.arguments import build_parser
from dil_kernels.option_names import as_on_command_line

OPTIONS = {action.dest: action for action in build_parser()._actions if action.dest != "help"}
NONSENSE = {
    "INT": ("", "x", "1.5", "nan", "inf", "-1", str(10**30)),
    "FLOAT": ("", "x", "nan", "inf", "-inf", "-1", "1e400"),
    "BOOL": ("", "maybe", "2"),
    "JSON": ("", "nonsense", "{", "[1]", "5"),
    "DIR": ("", "/dev/null/nowhere"),
}
MEANINGFUL = {("max_steps", "-1"), ("local_rank", "-1")}
CHECKED_LATER = {"config"}  # with a value, they are looked up


class LoadedError(BaseException):
    """Raised where data would be read."""


def run(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and last line of a command; 0 where it would go on to load data."""

    def load(*args: object) -> None:
        raise LoadedError

    monkeypatch.setattr(cli, "_load_data", load)
    try:
        status = cli.main(argv)
    except SystemExit as end:
        status = end.code
    except LoadedError:
        status = 0
    lines = capsys.readouterr().err.strip().splitlines()
    return status, lines[-1] if lines else ""


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    options = {"model": "m", "train-file": "t.jsonl", "eval-file": "e.jsonl", "output-dir": tmp_path / "out"}
    return [f"--{name}={value}" for name, value in options.items()] + ["--lora-rank=4", "--use-cpu"]


def values_of(action: argparse.Action) -> tuple[str, ...]:
    if action.choices is not None:
        return "", "nonsense"
    return NONSENSE.get(str(action.metavar), ("",))


@pytest.mark.parametrize("name", OPTIONS)
def test_nonsense_is_refused_by_name_before_anything_is_loaded(
    name: str, base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    action = OPTIONS[name]
    for value in values_of(action):
        status, line = run([*base, f"{action.option_strings[0]}={value}"], monkeypatch, capsys)
        if (name, value) in MEANINGFUL:
            assert status == 0, line
            continue
        assert status == 2, (value, line)
        assert line.startswith("dil-train: error: "), (value, line)
        assert action.option_strings[0] in line, (value, line)
    assert not os.path.exists(base[3].removeprefix("--output-dir="))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--learning-rate=-1e-6", "--learning-rate must be at least 0 and at most 10000, got -1e-06"),
        ("--max-steps=0", "--max-steps must be -1, or at least 1, got 0"),
        ("--num-train-epochs=0", "--num-train-epochs must be above 0 and at most 1000000000, got 0.0"),
        ("--gradient-accumulation-steps=0", "--gradient-accumulation-steps must be at least 1"),
        ("--adam-beta2=1", "--adam-beta2 must be at least 0 and below 1, got 1.0"),
        ("--save-total-limit=0", "--save-total-limit must be at least 1, got 0"),
        (
            "--backend=triton",
            "--backend triton was asked for but cannot run: Triton kernels take CUDA tensors, not cpu",
        ),
        ("--use-liger-kernel", "--use-liger-kernel true was given, but Liger's kernels need a GPU"),
        (
            "--metric-for-best-model=rewards/margin",
            "--metric-for-best-model rewards/margin: evaluation has no such metric",
        ),
        ('--lr-scheduler-kwargs={"a": 1}', "--lr-scheduler-type linear, --lr-scheduler-kwargs"),
        ("--optim-args=nonsense", "--optim adamw_torch"),
        ("--torch-compile-backend=nonsense", "--torch-compile-backend nonsense: unknown; available: "),
        ("--torch-compile-mode=nonsense", "--torch-compile-mode nonsense: unknown; available: default"),
        ("--deepspeed=nowhere.json", "argument --deepspeed: expected a JSON object, got 'nowhere.json'"),
        (
            "--max-prompt-length=8 --max-length=none",
            "--max-prompt-length 8 was given, but --max-length none cuts nothing",
        ),
        ("--alpha=nan", "--alpha must be in [0, 1], got nan"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_loaded(
    options: str, message: str, base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "triton_interpreted", lambda: False)
    backends.triton_problem.cache_clear()
    monkeypatch.setattr(backends, "triton_problem", lambda: None)
    parts = [options] if "{" in options else options.split()
    status, line = run([*base, *parts], monkeypatch, capsys)
    assert status == 2
    assert message in line


@pytest.mark.parametrize(
    ("said", "spelled"),
    [
        ("max_length=None cuts nothing", "--max-length none cuts nothing"),
        ("loss_type='lsif' has no beta", "--loss-type lsif has no beta"),
        ("padding_free=True was given, but\n  x", "--padding-free true was given, but x"),
        ("set `max_steps` or --num_train_epochs", "set --max-steps or --num-train-epochs"),
        ("/data/max_length/seed=1.txt, column 'max_length'", "/data/max_length/seed=1.txt, column 'max_length'"),
        ("alpha must be in [0, 1]; alpha, my_max_length", "--alpha must be in [0, 1]; alpha, my_max_length"),
    ],
)
def test_messages_name_options_as_the_command_line_does(said: str, spelled: str) -> None:
    names = ["beta", "alpha", "seed", "loss_type", "max_length", "max_steps", "num_train_epochs", "padding_free"]
    assert as_on_command_line(said, names) == spelled
