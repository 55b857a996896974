from __future__ import annotations

import csv
import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dil_kernels
from dil_kernels.cli.environment import cpu_name

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from families.logprob import FORWARD, FORWARD_BACKWARD, LOGPROB, LogprobCase, make_inputs, make_truth, measure_errors
from families.logprob_providers import BASELINE, PROVIDERS, eager_sequence_logps
from families.loss import LOSS
from harness import timing
from harness.check import allowed_errors, find_problem
from harness.command import main
from harness.family import OURS, Provider
from harness.machine import last_cache_bytes
from harness.records import read_csv as read_records
from harness.records import write_csv
from harness.timing import CALLS_PER_ROUND, WARMUP_CALLS, Budget, Sample, quantiles, time_interleaved
from harness.trace import trace_call

REPOSITORY = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def read_csv(folder: Path, name: str = "logprob") -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


RUN_ONCE = pytest.mark.xdist_group("quick benchmark")  # not once a worker


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """The command as a person runs it, on the quick grid: what it printed, its CSV, its folder."""
    folder = tmp_path_factory.mktemp("bench")
    package_root = str(Path(dil_kernels.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_logprob.py", "--quick", "--device", "cpu", "--output", str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([package_root, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, read_csv(folder), folder


@RUN_ONCE
def test_csv_has_every_case_provider_and_pass(quick_run):
    _, rows, _ = quick_run
    expected = [
        (case.name, provider, timed.name)
        for case in LOGPROB.grids["quick"]
        for timed in LOGPROB.passes
        for provider in PROVIDERS
    ]
    assert [(row["case"], row["provider"], row["pass_name"]) for row in rows] == expected


@RUN_ONCE
def test_timed_rows_are_complete_and_consistent(quick_run):
    _, rows, _ = quick_run
    timed = [row for row in rows if row["status"] == "ok"]
    assert {row["provider"] for row in timed} >= {OURS, BASELINE, "eager"}
    for row in timed:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert int(row["samples"]) == 2 * CALLS_PER_ROUND
        assert math.isfinite(float(row["max_error"]))
        assert float(row["max_error"]) <= float(row["max_error_allowed"])
        gbps = int(row["bytes"]) / float(row["p50_ms"]) / 1e6
        assert float(row["share_of_floor"]) == pytest.approx(gbps / float(row["copy_gbps"]), rel=1e-4)
        assert float(row["floor_ms"]) == pytest.approx(int(row["bytes"]) / float(row["copy_gbps"]) / 1e6, rel=1e-4)
        (baseline,) = [
            r for r in timed if (r["case"], r["pass_name"], r["provider"]) == (row["case"], row["pass_name"], BASELINE)
        ]
        ratio = float(baseline["p50_ms"]) / float(row["p50_ms"])
        assert float(row["speedup"]) == pytest.approx(ratio, rel=1e-4)
        assert row["device"]
        assert (row["torch"], row["dil_kernels"]) == (torch.__version__, dil_kernels.__version__)
        assert row["commit"]
        assert row["date"].endswith("+00:00")


@RUN_ONCE
def test_unavailable_providers_are_listed_with_reasons(quick_run):
    printed, rows, _ = quick_run
    for name in ("trl", "liger", "quack", "flash-attn"):
        mine = [row for row in rows if row["provider"] == name]
        assert {row["status"] for row in mine} == {"unavailable"}
        (reason,) = {row["reason"] for row in mine}
        assert "not installed" in reason or "runs on cuda only" in reason
        assert f"not run    {name}: {reason}" in printed
        assert {row["p50_ms"] for row in mine} == {""}


@RUN_ONCE
def test_output_fits_110_columns(quick_run):
    printed, _, _ = quick_run
    # The names of the device, the versions and the output folder are as long as they are.
    free = ("device ", "versions ", "written: ")
    assert [line for line in printed.splitlines() if len(line) > 110 and not line.startswith(free)] == []


@RUN_ONCE
def test_records_survive_the_file(quick_run, tmp_path):
    _, _, folder = quick_run
    records = read_records(folder / "logprob.csv")
    write_csv(tmp_path / "again.csv", records)
    assert read_records(tmp_path / "again.csv") == records
    assert (tmp_path / "again.csv").read_bytes() == (folder / "logprob.csv").read_bytes()
    ours = next(r for r in records if r.provider == OURS)
    assert (ours.columns["vocab"], ours.columns["dtype"]) == (1000, "fp32")
    assert ours.flops is None


@RUN_ONCE
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_picture_is_written(quick_run):
    _, _, folder = quick_run
    assert (folder / "logprob.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("case", "forward", "forward_backward"),
    [
        # 16 rows of 4,000 bytes, 8 scored: 8 rows read; 8 read twice and 16 written.
        (LogprobCase(2, 8, 1000, torch.float32, 50), 32_000, 128_000),
        # 16 rows of 2,006 bytes, 7 of each 8 scored, since the last predicts nothing: 14 read; 14 twice and 16 written.
        (LogprobCase(2, 8, 1003, torch.bfloat16, 100), 28_084, 88_264),
        # 8,192 rows of 256,512 bytes, 4,096 scored.
        (LogprobCase(4, 2048, 128256, torch.bfloat16, 50), 1_050_673_152, 4_202_692_608),
    ],
)
def test_bytes_counted(case, forward, forward_backward):
    assert FORWARD.bytes_counted(case) == forward
    assert FORWARD_BACKWARD.bytes_counted(case) == forward_backward


@pytest.mark.parametrize("family", [LOGPROB, LOSS], ids=lambda family: family.name)
def test_families_are_consistent(family):
    for grid in family.grids.values():
        assert len({case.name for case in grid}) == len(grid)
        assert len({case.title for case in grid}) == len(grid)
        for case in grid:
            assert family.curves.keys() <= case.columns.keys()
            assert all(words.format(**case.columns) for words in family.curves.values())
    assert next(iter(family.providers)) == OURS
    assert family.baseline in family.providers
    assert all(name == provider.name for name, provider in family.providers.items())


@pytest.mark.parametrize("percent", [50, 100])
def test_inputs_score_as_many_rows_as_the_case_says(percent):
    case = LogprobCase(3, 8, 11, torch.float32, percent)
    inputs = make_inputs(case, CPU)
    assert int((inputs.labels[:, 1:] != -100).sum()) == case.scored_rows == {50: 12, 100: 21}[percent]
    assert len(set(inputs.upstream.tolist())) == 3


class EditGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, edit):
        ctx.edit = edit
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return ctx.edit(grad), None


def edit_logits_gradient(edit):
    return lambda logits, labels: eager_sequence_logps(EditGradient.apply(logits, edit), labels)


def raise_error(logits, labels):
    raise RuntimeError("no kernel image\nand more")


WRONG_PROVIDERS = {
    "labels not shifted": (
        lambda logits, labels: eager_sequence_logps(logits, labels.roll(1, 1)),
        "wrong",
        "wrong log-probs",
    ),
    "fp16 softmax": (lambda logits, labels: eager_sequence_logps(logits.half(), labels), "wrong", "wrong log-probs"),
    "NaN": (lambda logits, labels: eager_sequence_logps(logits, labels) * math.nan, "wrong", "wrong log-probs"),
    "wrong shape": (lambda logits, labels: eager_sequence_logps(logits, labels).sum(), "failed", "RuntimeError"),
    "gradient of the label alone": (
        edit_logits_gradient(lambda grad: torch.where(grad.abs() == grad.abs().amax(-1, keepdim=True), grad, 0)),
        "wrong",
        "wrong gradient: relative",
    ),
    "upstream gradient ignored": (
        lambda logits, labels: EditGradient.apply(eager_sequence_logps(logits, labels), torch.ones_like),
        "wrong",
        "wrong gradient: relative",
    ),
    "gradient in ignored rows": (
        edit_logits_gradient(lambda grad: torch.where(grad == 0, 1e-12, grad)),
        "wrong",
        "wrong gradient: rows that are not scored",
    ),
    "raises": (raise_error, "failed", "RuntimeError: no kernel image"),
}


@pytest.mark.parametrize("name", WRONG_PROVIDERS)
def test_wrong_provider_is_caught_and_not_timed(name, tmp_path):
    fn, status, reason = WRONG_PROVIDERS[name]
    providers = {OURS: Provider(OURS, name, lambda: fn), BASELINE: PROVIDERS[BASELINE]}
    arguments = ["--quick", "--device", "cpu", "--cases", "fp32", "--output", str(tmp_path)]
    assert main(dataclasses.replace(LOGPROB, providers=providers), arguments) == 1
    rows = read_csv(tmp_path)
    assert {row["status"] for row in rows if row["provider"] == BASELINE} == {"ok"}
    for row in rows:
        if row["provider"] == OURS:
            assert row["status"] == status
            assert row["reason"].startswith(reason)
            assert row["p50_ms"] == ""


def test_wrong_peer_is_reported_but_does_not_fail_the_run(tmp_path, capsys):
    wrong = Provider("peer", "twice too large", lambda: lambda logits, labels: 2 * eager_sequence_logps(logits, labels))
    providers = {OURS: PROVIDERS[OURS], "peer": wrong}
    arguments = ["--quick", "--device", "cpu", "--cases", "fp32", "--output", str(tmp_path)]
    assert main(dataclasses.replace(LOGPROB, providers=providers), arguments) == 0
    assert "not timed, wrong: wrong log-probs: relative error 1.0e+00" in capsys.readouterr().out
    statuses = {row["provider"]: row["status"] for row in read_csv(tmp_path)}
    assert statuses == {OURS: "ok", "peer": "wrong"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "module"), [("trl", "trl"), ("trl-eager", "trl"), ("liger", "liger_kernel")])
def test_peers_are_called_rightly(name, module, dtype):
    """Where they are installed; on a machine without CUDA, in Triton's interpreter."""
    pytest.importorskip(module)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = make_inputs(LogprobCase(2, 6, 1003, dtype, 50), device)
    truth = make_truth(inputs)
    eager = measure_errors(eager_sequence_logps, inputs, truth)
    provider = PROVIDERS[name]
    errors = measure_errors(provider.build(), inputs, truth)
    assert find_problem(errors, allowed_errors(LOGPROB, eager, provider, dtype)) is None


def test_a_check_that_could_not_fail_is_none() -> None:
    problem = find_problem({"gradient": math.inf}, {"gradient": math.inf})
    assert problem == "unknown gradient: eager PyTorch has no finite error to go by"
    for path in sorted((REPOSITORY / "benchmarks" / "results").glob("*/*.csv")):
        with path.open(newline="") as file:
            limits = [row["max_error_allowed"] for row in csv.DictReader(file) if row.get("max_error_allowed")]
        assert all(math.isfinite(float(limit)) for limit in limits), path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--providers", "dil_kernels,quick"],
            "--providers quick: unknown; there are dil_kernels, dil_kernels-inplace,",
        ),
        (["--cases", "int4"], "--cases int4: no case has that in its name; there are"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--minutes", "-1"], "--minutes must be above 0, got -1"),
        (["--seconds", "0"], "--seconds must be above 0, got 0.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(LOGPROB, ["--device", "cpu", *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_rounds_interleave_and_rotate():
    order: list[tuple[str, int]] = []
    calls = {name: lambda i, name=name: order.append((name, i)) for name in "abc"}
    times = time_interleaved(calls, CPU, Budget(seconds=0.0, min_rounds=2, max_rounds=2))
    per_turn = 1 + CALLS_PER_ROUND
    turns = order[3 * WARMUP_CALLS :]
    assert [name for name, _ in turns[::per_turn]] == ["a", "b", "c", "b", "c", "a"]
    # Every call takes the next buffer, also after one of another provider: none finds its input in cache.
    assert [i for _, i in turns] == list(range(6 * per_turn))
    assert {name: time.samples for name, time in times.items()} == dict.fromkeys("abc", 2 * CALLS_PER_ROUND)


def test_quantiles():
    result = quantiles([Sample(ms, ms / 10) for ms in (5.0, 1.0, 2.0, 3.0, 4.0, 6.0)])
    assert (result.p20, result.p50, result.p80, result.samples, result.host_p50) == (2.0, 3.5, 5.0, 6, 0.35)


def test_a_long_call_is_made_once_a_round(monkeypatch) -> None:
    monkeypatch.setattr(timing, "LONG_MS", 0.0)
    made: list[str] = []
    calls = {name: lambda _i, name=name: made.append(name) for name in "ab"}
    times = time_interleaved(calls, CPU, Budget(seconds=0.0, min_rounds=3, max_rounds=3))
    assert made == list("ab" + "ab" + "ba" + "ab")  # the first two to find that they are long
    assert {name: time.samples for name, time in times.items()} == {"a": 3, "b": 3}


def test_peak_memory_counts_what_is_held_together():
    def call(i: int) -> None:
        torch.zeros(1000)  # freed before the next is made
        held = torch.zeros(500)
        held.exp().exp()

    assert trace_call(call, CPU).peak_bytes == 3 * 500 * 4


def test_machine_is_named():
    assert cpu_name()
    assert last_cache_bytes(CPU) > 0
