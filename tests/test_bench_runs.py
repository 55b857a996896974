"""Whole runs of the benchmarks: resumed, cut short, of wrong or failing providers, of the loss."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch
from test_bench import CPU, read_csv

from families.logprob import LOGPROB, make_inputs
from families.logprob_providers import BASELINE, PROVIDERS, eager_sequence_logps
from families.loss import LOSS, LossCase
from harness.ceilings import Ceilings, Gemm, Rates
from harness.command import main
from harness.family import OURS, Family, Pass, Provider
from harness.records import read_csv as read_records
from harness.records import write_csv


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Which take longer than these runs; tests/test_bench_pictures.py looks at them."""
    monkeypatch.setattr("harness.command._draw", lambda *args: 0)


def of_providers(family: Family, *providers: Provider) -> Family:
    return dataclasses.replace(family, providers={provider.name: provider for provider in providers})


def run_quick(family: Family, folder: Path, *arguments: str) -> int:
    return main(family, ["--quick", "--device", "cpu", "--output", str(folder), *arguments])


def count_builds(provider: Provider) -> tuple[Provider, list[str]]:
    built: list[str] = []

    def build():
        built.append(provider.name)
        return provider.build()

    return dataclasses.replace(provider, build=build), built


def test_a_stopped_run_is_resumed_and_keeps_what_is_there(tmp_path, capsys):
    ours, built = count_builds(PROVIDERS[OURS])
    family = of_providers(LOGPROB, ours, PROVIDERS[BASELINE])
    first, second = LOGPROB.grids["quick"]
    assert run_quick(family, tmp_path, "--cases", first.name) == 0
    kept = read_csv(tmp_path)
    assert run_quick(family, tmp_path, "--resume") == 0
    assert f"kept from {tmp_path / 'logprob.csv'}: 1 of 2 cases" in capsys.readouterr().out
    rows = read_csv(tmp_path)
    assert rows[: len(kept)] == kept
    assert {row["case"] for row in rows[len(kept) :]} == {second.name}
    assert len(built) == 2
    assert run_quick(family, tmp_path, "--resume") == 0
    assert len(built) == 2
    assert run_quick(family, tmp_path) == 0
    assert len(built) == 4


def change_version(records):
    return [dataclasses.replace(r, version="dil_kernels 0.0.1") for r in records]


def test_a_file_of_an_earlier_version_is_not_resumed(tmp_path, capsys):
    (tmp_path / "logprob.csv").write_text("case,provider,p50_ms\n2x8-v1000-fp32-50pct,dil_kernels,1.0\n")
    assert run_quick(of_providers(LOGPROB, PROVIDERS[OURS]), tmp_path, "--resume") == 0
    assert "kept from" not in capsys.readouterr().out
    assert {row["status"] for row in read_csv(tmp_path)} == {"ok"}


def change_source(records):
    return [dataclasses.replace(r, machine=dataclasses.replace(r.machine, source="0")) for r in records]


def drop_a_pass(records):
    return [r for r in records if r.pass_name == "forward"]


def make_unavailable(records):
    return [dataclasses.replace(r, status="unavailable", version="", reason="not installed") for r in records]


@pytest.mark.parametrize("change", [change_version, change_source, drop_a_pass, make_unavailable])
def test_records_of_another_setting_are_measured_again(change, tmp_path):
    ours, built = count_builds(PROVIDERS[OURS])
    family = of_providers(LOGPROB, ours)
    run_quick(family, tmp_path, "--cases", "fp32")
    csv_path = tmp_path / "logprob.csv"
    records = read_records(csv_path)
    write_csv(csv_path, change(records))
    run_quick(family, tmp_path, "--cases", "fp32", "--resume")
    assert len(built) == 2
    assert {r.status for r in read_records(csv_path)} == {"ok"}
    assert len(read_records(csv_path)) == len(records) == 2


def test_a_run_past_its_minutes_says_so(tmp_path, capsys):
    slow = dataclasses.replace(
        PROVIDERS[OURS], build=lambda: lambda *inputs: time.sleep(0.1) or eager_sequence_logps(*inputs)
    )
    family = of_providers(LOGPROB, slow)
    assert run_quick(family, tmp_path, "--minutes", "0.001") == 3
    assert "not finished: 1 cases left" in capsys.readouterr().out
    assert {row["case"] for row in read_csv(tmp_path)} == {LOGPROB.grids["quick"][0].name}
    assert run_quick(of_providers(LOGPROB, slow), tmp_path, "--resume", "--minutes", "5") == 0
    assert len({row["case"] for row in read_csv(tmp_path)}) == 2


def test_what_fails_only_when_timed_is_reported(tmp_path):
    calls = []

    def fails_later(logits, labels):
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("no more")
        return eager_sequence_logps(logits, labels)

    peer = Provider("peer", "", lambda: fails_later)
    family = of_providers(LOGPROB, PROVIDERS[OURS], peer)
    assert run_quick(family, tmp_path, "--cases", "fp32") == 0
    rows = [row for row in read_csv(tmp_path) if row["provider"] == "peer"]
    assert {(row["status"], row["reason"], row["p50_ms"]) for row in rows} == {
        ("failed", "OutOfMemoryError: no more", "")
    }


def test_inputs_that_do_not_fit_leave_the_other_cases(tmp_path):
    def make(case, device):
        if case.dtype == torch.float32:
            raise torch.OutOfMemoryError("too large")
        return make_inputs(case, device)

    family = dataclasses.replace(of_providers(LOGPROB, PROVIDERS[BASELINE]), make_inputs=make)
    assert run_quick(family, tmp_path) == 0
    assert [row["status"] for row in read_csv(tmp_path)] == ["failed", "failed", "ok", "ok"]


def test_the_floor_is_the_longer_of_moving_and_multiplying():
    rates = Rates(copy_gbps=100.0, gemm_tflops=2.0)
    assert rates.floor_ms(300_000_000, None) == pytest.approx(3.0)
    assert rates.floor_ms(300_000_000, 2_000_000_000) == pytest.approx(3.0)
    assert rates.floor_ms(300_000_000, 8_000_000_000) == pytest.approx(4.0)
    gemm = Gemm(CPU, torch.float32, quick=True)
    assert gemm.tflops(2.0) == pytest.approx(2 * gemm.size**3 / 2e-3 / 1e12)


def test_a_pass_that_counts_flops_is_measured_beside_a_gemm(tmp_path):
    def run(fn, inputs):
        fn(inputs.logits.detach(), inputs.labels)

    multiply = Pass(
        "multiply", "as many FLOPs as the ceiling", "log-probs", run, lambda case: 1, lambda case: 2 * 128**3
    )
    family = dataclasses.replace(
        of_providers(LOGPROB, PROVIDERS[OURS]), passes=(multiply,), columns=("median ms", "TFLOP/s", "of floor")
    )
    assert run_quick(family, tmp_path, "--cases", "fp32") == 0
    (record,) = read_records(tmp_path / "logprob.csv")
    assert record.gemm_tflops > 0
    assert record.floor_ms == pytest.approx(2 * 128**3 / record.gemm_tflops / 1e9, rel=1e-4)
    assert record.tflops == pytest.approx(2 * 128**3 / record.p50_ms / 1e9)


def test_ceilings_are_made_once():
    ceilings = Ceilings(CPU, quick=True)
    assert ceilings.calls(torch.float32)["gemm"] is ceilings.calls(torch.float32)["gemm"]
    assert "gemm" not in ceilings.calls(None)


def test_the_loss_benchmark_runs(tmp_path):
    assert run_quick(LOSS, tmp_path) == 0
    rows = read_csv(tmp_path, "loss")
    assert {row["status"] for row in rows} <= {"ok", "unavailable"}
    launches = {(r["case"], r["pass_name"], r["provider"]): int(r["launches"]) for r in rows if r["status"] == "ok"}
    for case in LOSS.grids["quick"]:
        for timed in LOSS.passes:
            assert 0 < launches[case.name, timed.name, OURS] < launches[case.name, timed.name, "plain"]


# 6 sequences of 17 tokens, 8 scored: labels 8 bytes, log-probs 4 of each model, a gradient of 4 for each of 16.
def test_bytes_of_the_loss_are_counted():
    forward, both = LOSS.passes
    assert forward.bytes_counted(LossCase(3, 17)) == 6 * (17 * 8 + 8 * 8)
    assert both.bytes_counted(LossCase(3, 17)) == 6 * (17 * 8 + 8 * 8 + 16 * 4)


WRONG_LOSSES = {
    "chosen and rejected swapped": lambda out: out._replace(
        chosen_rewards=out.rejected_rewards, rejected_rewards=out.chosen_rewards
    ),
    "sums averaged": lambda out: out._replace(chosen_logps=out.chosen_logps / 8),
    "losses of the wrong sign": lambda out: out._replace(losses=-out.losses),
    "gradient halved": lambda out: out._replace(loss=out.loss / 2 + out.loss.detach() / 2),
}


@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_a_wrong_loss_is_caught(name, tmp_path):
    right = LOSS.providers["plain"].build()
    wrong = Provider(OURS, name, lambda: lambda *inputs: WRONG_LOSSES[name](right(*inputs)))
    assert run_quick(of_providers(LOSS, wrong, LOSS.providers["plain"]), tmp_path) == 1
    assert {row["status"] for row in read_csv(tmp_path, "loss") if row["provider"] == OURS} == {"wrong"}
