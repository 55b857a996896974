"""The benchmark of the head: what it counts, its truth, and that every implementation is called rightly."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from families.linear import FORWARD, FORWARD_BACKWARD, LINEAR, LinearCase, make_inputs, make_truth, measure_errors
from families.linear_inputs import BETA
from families.linear_providers import PROVIDERS, eager_loss
from harness.check import allowed_errors, find_problem
from harness.command import main
from harness.family import OURS, Provider

CPU = torch.device("cpu")
TASKS = ("policy", "reference", "frozen", "nll")


@pytest.mark.parametrize(
    ("task", "forward", "forward_backward"), [("policy", 1, 3), ("reference", 2, 4), ("frozen", 1, 2), ("nll", 1, 3)]
)
def test_work_counted(task, forward, forward_backward):
    # 8,192 rows, half of them scored; a product is 2 * 4096 * 4096 * 128256 FLOPs, the weight 4096 * 128256 * 2 bytes.
    case = LinearCase(task, 4, 2048, 4096, 128256, torch.bfloat16, 50)
    assert FORWARD.flops_counted(case) == forward * 4_303_557_230_592
    assert FORWARD_BACKWARD.flops_counted(case) == forward_backward * 4_303_557_230_592
    assert FORWARD.bytes_counted(case) == forward * 1_050_673_152
    assert FORWARD_BACKWARD.bytes_counted(case) == forward_backward * 1_050_673_152


def test_case_names_are_unique():
    for grid in LINEAR.grids.values():
        assert len({case.name for case in grid}) == len(grid)


@pytest.mark.parametrize("task", TASKS)
def test_truth_is_that_of_autograd(task):
    inputs = make_inputs(LinearCase(task, 4, 7, 12, 53, torch.float64, 50), CPU)

    def logps(hidden, weight):
        targets = inputs.labels[:, 1:]
        values = (hidden @ weight.t())[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1))
        return values.squeeze(-1) * (targets != -100)

    policy = logps(inputs.hidden, inputs.weight)
    if task == "nll":
        loss, nats = -policy.sum() / (inputs.labels[:, 1:] != -100).sum(), policy.sum().unsqueeze(0)
    else:
        nats = policy.sum(-1)
        if task == "reference":
            nats = nats - logps(inputs.ref_hidden, inputs.ref_weight).sum(-1)
        loss = -logsigmoid(BETA * (nats[:2] - nats[2:])).mean()
    truth = make_truth(inputs)
    torch.testing.assert_close(truth.nats, nats.detach(), rtol=1e-12, atol=1e-12)
    for mine, autograds in zip(truth.gradients, torch.autograd.grad(loss, inputs.leaves), strict=True):
        torch.testing.assert_close(mine, autograds, rtol=1e-10, atol=1e-14)


PEERS = {"trl": "trl", "liger-dpo": "liger_kernel", "liger-scaled": "liger_kernel"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", [OURS, f"{OURS}-no-stash", "eager-compacted", "torch.compile", *PEERS])
def test_providers_are_called_rightly(name, task, dtype):
    """Peers where they are installed."""
    if name in PEERS:
        pytest.importorskip(PEERS[name])
    inputs = make_inputs(LinearCase(task, 4, 9, 24, 1003, dtype, 50), CPU)
    truth = make_truth(inputs)
    provider = PROVIDERS[name]
    if (name, task) == ("liger-dpo", "nll"):
        with pytest.raises(NotImplementedError, match="pairs only"):
            provider.build()(inputs)
        return
    errors = measure_errors(provider.build(), inputs, truth)
    allowed = allowed_errors(LINEAR, measure_errors(eager_loss, inputs, truth), provider, dtype)
    assert find_problem(errors, allowed) is None


@pytest.mark.parametrize("task", TASKS)
def test_the_products_alone_are_those_of_the_scored_rows(task):
    inputs = make_inputs(LinearCase(task, 4, 9, 24, 1003, torch.float32, 50), CPU)
    scored = inputs.labels[:, 1:] != -100
    with FlopCounterMode(display=False) as counter:
        grads = torch.autograd.grad(PROVIDERS["products"].build()(inputs)[0], inputs.leaves)
    one = 2 * int(scored.sum()) * inputs.weight.numel()
    assert counter.get_total_flops() == one * {"frozen": 2, "reference": 4}.get(task, 3)
    x, weight = inputs.hidden.detach()[:, :-1][scored], inputs.weight.detach()
    product = x @ weight.t()
    torch.testing.assert_close(grads[0][:, :-1][scored], product @ weight)
    if task != "frozen":
        torch.testing.assert_close(grads[1], product.t() @ x)


def halved(inputs):
    loss, nats = eager_loss(inputs)
    return loss / 2, nats


def shifted(inputs):
    loss, nats = eager_loss(inputs)
    return loss, nats + 0.5


def test_products_alone_are_timed_and_no_rival(tmp_path, capsys):
    providers = {name: PROVIDERS[name] for name in (OURS, "eager", "products")}
    arguments = ["--quick", "--device", "cpu", "--cases", "frozen", "--output", str(tmp_path)]
    assert main(dataclasses.replace(LINEAR, providers=providers), arguments) == 0
    with (tmp_path / "linear.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["provider"] == "products"]
    assert [(row["status"], row["max_error"]) for row in rows] == [("ok", "")] * 2
    assert all(float(row["p50_ms"]) > 0 for row in rows)
    assert "products is ahead" not in capsys.readouterr().out


@pytest.mark.parametrize(("fn", "reason"), [(halved, "wrong gradient"), (shifted, "wrong nats")])
def test_wrong_provider_is_caught_and_not_timed(fn, reason, tmp_path):
    providers = {OURS: Provider(OURS, "wrong", lambda: fn), "eager": PROVIDERS["eager"]}
    arguments = ["--quick", "--device", "cpu", "--cases", "fp32", "--output", str(tmp_path)]
    assert main(dataclasses.replace(LINEAR, providers=providers), arguments) == 1
    with (tmp_path / "linear.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows if row["provider"] == "eager"} == {"ok"}
    ours = [row for row in rows if row["provider"] == OURS]
    assert {row["status"] for row in ours} == {"wrong"}
    assert all(row["reason"].startswith(reason) and row["p50_ms"] == "" for row in ours)


def test_ranks(tmp_path):
    """Two processes, each with a part of the vocabulary, beside one and beside torch's loss_parallel."""
    script = Path(__file__).parents[1] / "benchmarks" / "bench_linear.py"
    command = [sys.executable, str(script), "--ranks", "2", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    with (tmp_path / "linear_ranks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["provider"], row["processes"]) for row in rows[:3]] == [
        ("one process", "1"),
        ("dil_kernels", "2"),
        ("loss_parallel", "2"),
    ]
    assert all(float(row["p50_ms"]) > 0 and float(row["error"]) < 1e-5 for row in rows)
