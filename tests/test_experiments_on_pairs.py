"""Experiments on pairs of text: beside TRL, how exact log ratios are, and where training fails."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from csv_rows import read_csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import beside_trl, beside_trl_runs, exactness, failing_rates, forced_choice
from experiments.comparisons import chosen_at
from experiments.tables import describe_options, write_record


def test_the_same_loss_trains_alike_in_both_trainers(tmp_path, monkeypatch):
    """Same pairs, same order, same DPO loss: so the held-out curves of TRL's trainer are those of DILTrainer."""
    pytest.importorskip("trl")
    in_a_process = subprocess.run

    def run(command, **kwargs):
        """One run in a process of its own, as all are; the others here, as importing takes longer than they do."""
        if command[1:3] != ["-m", "experiments.beside_trl"] or "start" in command[-1]:
            return in_a_process(command, **kwargs)
        return subprocess.CompletedProcess(command, beside_trl.main(command[3:]))

    monkeypatch.setattr(subprocess, "run", run)
    command = ["--quick", "--runs-dir", str(tmp_path / "runs"), "--output", str(tmp_path)]
    assert beside_trl.main(command) == 0
    curves = read_csv(tmp_path / "curves.csv")
    arms = {name: [row for row in curves if row["arm"] == name] for name in ("trl dpo", "dil dpo", "dil lsif")}
    for ours, theirs in zip(arms["dil dpo"], arms["trl dpo"], strict=True):
        assert ours["step"] == theirs["step"]
        for metric in ("margin", "chosen_logp", "rejected_logp"):
            assert float(ours[metric]) == pytest.approx(float(theirs[metric]), abs=1e-4), (ours, theirs)
    assert float(arms["dil dpo"][-1]["margin"]) > 0.05
    runs = {row["arm"]: row for row in read_csv(tmp_path / "runs.csv")}
    assert runs["dil lsif"]["chosen_logp_change"] != runs["dil dpo"]["chosen_logp_change"]
    assert float(runs["dil dpo"]["kl_nats_a_token"]) > 0
    assert {row["kind"] for row in read_csv(tmp_path / "items.csv")} == {"sums", "copying", "agreement", "facts", "all"}
    for row in read_csv(tmp_path / "same_loss.csv"):
        assert float(row["largest_difference"]) < 1e-3
        assert int(row["step"]) == 0 or float(row["largest_log_ratio"]) > 0.1
    other, same, _ = read_csv(tmp_path / "differences.csv")
    assert (same["arm"], float(same["accuracy"]), float(same["response_accuracy"])) == ("trl dpo", 0.0, 0.0)
    for name in ("accuracy", "response_accuracy"):
        expected = float(runs["dil lsif"][name]) - float(runs["dil dpo"][name])
        assert float(other[name]) == pytest.approx(expected, abs=1e-4)
        assert float(other[f"{name}_standard_error"]) > 0
    pairs = [row for row in read_csv(tmp_path / "pairs.csv") if row["arm"] == "dil lsif"]
    won = [float(row["chosen_log_ratio"]) > float(row["rejected_log_ratio"]) for row in pairs]
    assert sum(won) / len(won) == pytest.approx(float(runs["dil lsif"]["response_accuracy"]), abs=1e-4)
    margins = read_csv(tmp_path / "equal_margins.csv")
    assert {row["arm"] for row in margins} == {*runs}
    assert {row["unit"] for row in margins} <= {"token", "response"}
    for row in margins:
        assert row["standard_error"] == "" or float(row["standard_error"]) > 0
        assert (row["beside_baseline"] == "") == (row["arm"] == "dil dpo")
        if row["arm"] == "trl dpo":
            assert float(row["beside_baseline"]) == pytest.approx(0.0, abs=1e-4)
    for arm, row in {row["arm"]: row for row in read_csv(tmp_path / "timing.csv")}.items():
        name = arm.replace(",", "").replace(" ", "_")
        timing = json.loads((tmp_path / "records" / f"timing_{name}_seed_0.json").read_text())
        assert timing["steps"] == 8
        assert float(row["tokens_per_second"]) == pytest.approx(timing["tokens_per_second"], rel=1e-4)
        for name in {arm, f"{arm}, 0.0003"} & {*runs}:
            assert float(runs[name]["seconds_per_step"]) == pytest.approx(timing["seconds_per_step"], rel=1e-4)
    assert float(runs["dil lsif, 0.0003"]["learning_rate"]) == 3e-4
    assert float(runs["dil lsif, 0.0003"]["margin"]) < float(runs["dil lsif"]["margin"])
    for name in ("accuracy.png", "curves.png", "learning_rates.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    # Finished runs are not made again.
    before = (tmp_path / "records" / "run_trl_dpo_seed_0.json").stat().st_mtime_ns
    assert beside_trl.main(command) == 0
    assert (tmp_path / "records" / "run_trl_dpo_seed_0.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match=r"holds a run with other options \(batch_size 4, now 2\)"):
        beside_trl.main([*command, "--batch-size", "2"])


def test_rates_are_those_of_the_largest_validation_margin_and_parts_of_a_step_are_taken_where_it_is_padded(tmp_path):
    options = beside_trl.parse_options(["--output", str(tmp_path), "--trl-micro-batch", "2"])
    for arm, best in ((beside_trl.DPO, 1e-4), (beside_trl.LSIF, 1e-5)):
        for run in beside_trl.tuning_runs(arm):
            validation = {"margin": 0.1 if run.learning_rate == best else -0.1, "accuracy": 1 - run.learning_rate}
            write_record(run.record_path(options), {"validation": validation})
    runs = [run for run in beside_trl.all_runs(options) if run.kind in ("run", "timing")]
    of_dpo = (beside_trl.DPO, beside_trl.TRL, beside_trl.PADDED, beside_trl.AT_ONCE)
    chosen = {run for run in runs if run.arm in (*of_dpo, beside_trl.LSIF) and run.learning_rate is None}
    assert {run.arm for run in chosen} == {*of_dpo, beside_trl.LSIF}
    for run in chosen:
        assert beside_trl.rate_of(run, options) == (1e-4 if run.arm in of_dpo else 1e-5)
        parts = run.arm in (beside_trl.TRL, beside_trl.PADDED)
        assert run.arm.pairs_at_a_time(options) == (2 if parts else 4)
    others = [run for run in runs if run.learning_rate is not None]
    assert others
    assert all(beside_trl.rate_of(run, options) == run.learning_rate for run in others)
    # One that is given is that of every run; and what only a speed is wanted of needs none.
    for given in (["--learning-rate", "3e-5"], ["--random-llama"]):
        options = beside_trl.parse_options(given)
        rates = {beside_trl.rate_of(run, options) for run in beside_trl.all_runs(options) if run.kind == "run"}
        assert rates == {float(given[-1]) if given[1:] else 1e-5}
    timing = beside_trl.Run("timing", beside_trl.TRL)
    options = beside_trl.parse_options(["--output", str(tmp_path)])
    record = {"options": describe_options(options), "pairs_at_a_time": 2}
    write_record(timing.record_path(options), record)
    with pytest.raises(SystemExit, match=r"other options \(pairs at a time 2, now 4\)"):
        beside_trl.check_finished(options)
    for refused in ("0", "3"):
        with pytest.raises(SystemExit):
            beside_trl.parse_options(["--trl-micro-batch", refused])


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_run_that_fails_takes_none_but_those_that_need_it(tmp_path, monkeypatch, capsys, jobs):
    options = beside_trl.parse_options(["--output", str(tmp_path)])
    runs = {run.name: run for run in beside_trl.all_runs(options)}
    kinds, lock = [], threading.Lock()

    def run(command, **_):
        made = runs[command[-1]]
        if made.name == "tuning dil dpo lr 1e-05 seed 0":
            return subprocess.CompletedProcess(command, 1)
        if made.kind in ("run", "timing"):
            try:
                beside_trl.rate_of(made, options)
            except FileNotFoundError:
                return subprocess.CompletedProcess(command, 1)
        validation = {"margin": made.learning_rate or 0.0}
        write_record(made.record_path(options), {"validation": validation, "pairs_at_a_time": 4})
        with lock:
            kinds.append(made.kind)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(beside_trl, "report", lambda _options: None)
    given = ["--output", str(tmp_path), "--runs-dir", str(tmp_path / "runs"), "--jobs", str(jobs)]
    assert beside_trl.main(given) == 1
    failed = capsys.readouterr().err.splitlines()[-1].removeprefix("failed: ")
    missing = {name for name, made in runs.items() if not made.record_path(options).is_file()}
    assert missing
    assert all("dpo" in name and name in failed for name in missing)
    if jobs > 1:
        assert kinds == sorted(kinds, key={"start": 0, "tuning": 0, "run": 1, "timing": 2}.__getitem__)


def test_runs_are_compared_where_they_first_have_a_margin():
    ratios = np.zeros((4, 2, 2))  # evaluations, pairs, sides
    ratios[:, :, 0] = np.array([0.0, 0.2, -0.4, 9.0])[:, None] + [0.0, 0.1]
    ratios[0] = 0.0
    ratios[:, :, 1] = np.array([0.0, -0.3, -1.4, 9.0])[:, None]
    means = np.array([[0.5, 0.5], [1.0, 0.0]]) @ ratios  # of both pairs, and the first
    # Margins of both are 0, 0.55, 1.05, 0.05; of the first pair 0, 0.5, 1, 0.
    assert chosen_at(means, 0.55).tolist() == pytest.approx([0.25, 0.2 - 0.1 * 0.6])
    assert chosen_at(means, 0.80).tolist() == pytest.approx([(0.25 - 0.35) / 2, 0.2 - 0.6 * 0.6])
    assert chosen_at(means, 0.25).tolist() == pytest.approx([0.25 * 0.25 / 0.55, 0.1])
    assert np.isnan(chosen_at(means, 1.02)).tolist() == [False, True]


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    """What was seen before the stop is kept, and the curve is that of a run that was not stopped."""
    whole, stopped = (
        beside_trl.parse_options(["--quick", "--runs-dir", str(tmp_path / name)]) for name in ("whole", "stopped")
    )
    for options in (whole, stopped):
        options.runs_dir.mkdir()
    run = beside_trl.Run("run", beside_trl.LSIF)
    expected = beside_trl_runs.make(run, 1e-3, whole)

    watch = beside_trl_runs.Watch.on_step_end

    def stop_after_9(self, args, state, control, **kwargs):
        watch(self, args, state, control, **kwargs)
        if state.global_step == 9:
            raise RuntimeError("stopped")

    monkeypatch.setattr(beside_trl_runs.Watch, "on_step_end", stop_after_9)
    with pytest.raises(RuntimeError, match="stopped"):
        beside_trl_runs.make(run, 1e-3, stopped)
    monkeypatch.setattr(beside_trl_runs.Watch, "on_step_end", watch)
    record = beside_trl_runs.make(run, 1e-3, stopped)
    assert record["held_out"] == expected["held_out"]
    losses = [[entry["loss"] for entry in seen["log"] if "loss" in entry] for seen in (record, expected)]
    assert len(losses[0]) == len(losses[1]) == record["steps"] == len(record["step_seconds"]) == 12


def test_no_prompt_is_in_two_sets_and_the_right_options_come_first():
    options = beside_trl.parse_options(["--quick"])
    sets = [beside_trl_runs.load_problem(options, tuning) for tuning in (False, True)]
    for problem in sets:
        prompts = [{str(row["prompt"]) for row in rows} for rows in (problem.train, problem.judged)]
        assert not prompts[0] & prompts[1]
    held_out, validation = ({str(row["prompt"]) for row in problem.judged} for problem in sets)
    assert not held_out & validation
    items = forced_choice.items()
    assert len(items) == len({*items}) == 480
    assert items == forced_choice.items()
    assert all(len({*item.options}) == len(item.options) for item in items)
    for item in items:
        if item.kind == "sums":
            a, _, b, _ = item.context.splitlines()[-1].split()
            assert int(item.options[0]) == int(a) + int(b)
        if item.kind == "copying":
            listed, again = item.context.split("\nThe same list again: ")
            assert listed.removeprefix("List: ").startswith(again.removesuffix(",") + "," + item.options[0])


def test_log_ratios_from_hidden_states_are_nearer_to_the_truth_than_those_of_rounded_logits(tmp_path):
    assert exactness.main(["--quick", "--output", str(tmp_path)]) == 0
    rows = {(row["method"], row["tokens"]): row for row in read_csv(tmp_path / "exactness.csv")}
    assert {method for method, _ in rows} >= {"ours, from hidden states", "ours, from logits", "log_softmax in bf16"}
    for (method, tokens), row in rows.items():
        error, ours = (float(each["rms_error"]) for each in (row, rows["ours, from hidden states", tokens]))
        assert error < 0.1
        assert ours < 1e-6 * int(tokens)
        if method not in ("ours, from hidden states", exactness.BODY):
            assert error > 50 * ours, method
    assert (tmp_path / "exactness.png").stat().st_size > 10_000


def test_the_smallest_failing_rate_is_found_in_few_runs(tmp_path, capfd):
    for first in range(9):
        tried = []

        def fails(rate, tried=tried, first=first):
            tried.append(rate)
            return rate >= first

        assert failing_rates.smallest_failing(range(8), fails) == (first if first < 8 else None)
        assert len(tried) <= 4
    command = ["--quick", "--runs-dir", str(tmp_path / "runs"), "--output", str(tmp_path)]
    assert failing_rates.main(command) == 0
    rows = read_csv(tmp_path / "failing_rates.csv")
    for summary in read_csv(tmp_path / "failing_rates_summary.csv"):
        outcomes = {
            float(row["learning_rate"]): row["outcome"] for row in rows if row["reduction"] == summary["reduction"]
        }
        failing = float(summary["smallest_rate_that_fails"])
        assert outcomes.pop(failing) == summary["how"] != "held"
        assert all((outcome == "held") == (rate < failing) for rate, outcome in outcomes.items())
    # Finished runs are not made again.
    capfd.readouterr()
    assert failing_rates.main(command) == 0
    assert "train data" not in "".join(capfd.readouterr())


def test_a_training_that_stops_at_its_loss_has_failed(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr("dil_kernels.trainer.DILTrainer.train", stop)
    options = failing_rates.parse_options(["--quick", "--runs-dir", str(tmp_path / "runs"), "--output", str(tmp_path)])
    assert failing_rates.train(failing_rates.ARMS[0], 1e-3, options)["outcome"] == "non-finite"
