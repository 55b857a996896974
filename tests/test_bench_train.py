"""The benchmark of a training step: what it counts, its truth, and that every trainer takes the same step."""

from __future__ import annotations

import csv
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import write_lines
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from families.train import STEP, TRAIN, make_inputs, make_truth, measure_errors
from families.train_inputs import BETA, DATA_VARIABLE, TrainCase
from families.train_providers import PROVIDERS, authors_step
from harness.check import allowed_errors, find_problem
from harness.command import main
from harness.family import OURS, Provider

pytestmark = pytest.mark.usefixtures("datasets_cache")

CPU = torch.device("cpu")
REFERENCES = ("model", "precomputed")
NOT_RUN = ("prefix-grouper", "flash-pref")


def tiny(reference: str, dtype: torch.dtype = torch.float32, data: str = "ragged") -> TrainCase:
    return TrainCase("tiny", data, 3, 24, reference, dtype)


@pytest.mark.parametrize(("reference", "forwards", "accesses"), [("model", 4, 11), ("precomputed", 3, 10)])
def test_work_counted(reference, forwards, accesses):
    # Llama-3.2-1B: 1,235,814,400 parameters, 262,668,288 of them the embedding, which is the head, too; 16 layers of
    # 32 heads of 64. A prompt of 1,024 tokens, two responses of as many; half of the 2,048^2 scores, and the diagonal.
    case = TrainCase("llama-1b", "equal", 1, 2048, reference, torch.bfloat16)
    body, head = 2 * 973_146_112 * 4096, 2 * 262_668_288 * 2048
    attention = 2 * (2 * 2 * 16 * 32 * 64) * (2048 * 2049 // 2)
    assert STEP.flops_counted(case) == forwards * (body + head + attention)
    assert STEP.bytes_counted(case) == accesses * 1_235_814_400 * 2
    assert (case.columns["tokens"], case.columns["scored_tokens"], case.columns["padded_tokens"]) == (4096, 2048, 4096)


def test_ragged_pairs_are_ragged_and_the_longest_is_as_said():
    columns = TrainCase("llama-1b", "ragged", 8, 2048, "model", torch.bfloat16).columns
    assert columns["longest"] == 2048
    assert columns["padded_tokens"] == 16 * 2048
    assert columns["tokens"] < 0.7 * columns["padded_tokens"]


def test_real_pairs_are_those_that_are_short_enough(tmp_path, monkeypatch):
    pairs = [{"prompt": "yes " * n, "chosen": "no " * 3, "rejected": "yes"} for n in (2, 9, 4, 3)]
    file = write_lines(tmp_path / "pairs.jsonl", *pairs)
    monkeypatch.setenv(DATA_VARIABLE, str(file))
    case = TrainCase("tiny", "real", 2, 8, "model", torch.float32)  # a response ends with its end-of-sequence token
    assert [len(prompt) + len(response) for prompt, response in case.sequences] == [6, 8, 4, 6]
    with pytest.raises(ValueError, match="only 0 pairs are no longer than 3 tokens"):
        _ = dataclasses.replace(case, tokens=3).examples


@pytest.mark.parametrize(("prompt", "response", "pairs"), [(512, 256, 8), (2048, 128, 4)])
def test_prompts_and_responses_of_the_gpu_cases_are_as_long_as_said(prompt, response, pairs):
    (case,) = (case for case in TRAIN.grids["cuda"] if case.data == f"prompt-{prompt}")
    assert {(len(p), len(r)) for p, r in case.sequences} == {(prompt, response)}
    assert case.columns["tokens"] == 2 * pairs * (prompt + response)
    assert len({tuple(example["prompt_ids"]) for example in case.examples}) == pairs


@pytest.mark.parametrize("name", NOT_RUN)
def test_peers_that_cannot_run_say_why(name, tmp_path):
    assert PROVIDERS[name].problem(CPU) == PROVIDERS[name].problem(torch.device("cuda"))
    arguments = ["--quick", "--device", "cpu", "--cases", "3x24-model", "--providers", f"authors,{name}"]
    assert main(TRAIN, [*arguments, "--output", str(tmp_path)]) == 0
    with (tmp_path / "train.csv").open(newline="") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert (rows[name]["status"], rows[name]["reason"]) == ("unavailable", PROVIDERS[name].problem(CPU))


def test_case_names_are_unique():
    for grid in TRAIN.grids.values():
        assert len({case.name for case in grid}) == len(grid)


@pytest.mark.parametrize("reference", REFERENCES)
def test_truth_is_that_of_one_padded_batch(reference):
    inputs = make_inputs(tiny(reference, torch.float64), CPU)
    batch = inputs.padded_batch()

    def sums(model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (logps * (labels != -100)).sum(-1)

    chosen, rejected = (sums(inputs.model) - sums(inputs.reference)).chunk(2)
    assert (chosen - rejected).abs().min() > 1e-2, "a policy that is its reference proves nothing"
    loss = -logsigmoid(BETA * (chosen - rejected)).mean()
    truth = make_truth(inputs)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if reference == "model" else {"rtol": 1e-5, "atol": 1e-5}  # fp32 sums
    torch.testing.assert_close(truth.loss, loss.detach(), **tolerance)
    gradients = torch.autograd.grad(loss, list(inputs.probed.values()))
    assert len(gradients) == 6  # two norms in each of two layers, the last norm, the head
    for mine, autograds in zip(truth.gradients.values(), gradients, strict=True):
        torch.testing.assert_close(mine, autograds, **tolerance)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("name", [name for name in PROVIDERS if name not in ("trl-liger", *NOT_RUN)])
def test_every_provider_takes_the_same_step(name, reference):
    if "trl" in name:
        pytest.importorskip("trl")
    inputs = make_inputs(tiny(reference), CPU)
    truth = make_truth(inputs)
    fn = PROVIDERS[name].build()
    before = {key: value.clone() for key, value in inputs.model.state_dict().items()}
    for _ in range(2):  # the second call finds what the first has left
        errors = measure_errors(fn, inputs, truth)
        allowed = allowed_errors(TRAIN, measure_errors(authors_step, inputs, truth), PROVIDERS[name], torch.float32)
        assert find_problem(errors, allowed) is None
        STEP.run(fn, inputs)
    assert all(torch.equal(value, before[key]) for key, value in inputs.model.state_dict().items())
    assert all(parameter.grad is None for parameter in inputs.model.parameters())


def without_reference(inputs):
    ref = inputs.reference
    inputs.reference = inputs.model
    loss = authors_step(inputs)
    inputs.reference = ref
    return loss


def half_of_the_gradient(inputs):
    loss = authors_step(inputs)
    for parameter in inputs.model.parameters():
        parameter.grad /= 2
    return loss


def nearly_all_of_the_gradient(inputs):
    loss = authors_step(inputs)
    for parameter in inputs.model.parameters():
        parameter.grad *= 0.999
    return loss


@pytest.mark.parametrize(
    ("fn", "reason"), [(without_reference, "wrong loss"), (half_of_the_gradient, "wrong gradient")]
)
def test_wrong_provider_is_caught_and_not_timed(fn, reason, tmp_path):
    providers = {OURS: Provider(OURS, "wrong", lambda: fn), "authors": PROVIDERS["authors"]}
    arguments = ["--quick", "--device", "cpu", "--cases", "3x24-model", "--output", str(tmp_path)]
    assert main(dataclasses.replace(TRAIN, providers=providers), arguments) == 1
    with (tmp_path / "train.csv").open(newline="") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert rows["authors"]["status"] == "ok"
    assert rows[OURS]["status"] == "wrong"
    assert rows[OURS]["reason"].startswith(reason)
    assert rows[OURS]["p50_ms"] == ""


def test_a_wrong_gradient_is_caught_in_bf16_where_the_model_rounds_more_than_that():
    inputs = make_inputs(tiny("model", torch.bfloat16), CPU)
    truth = make_truth(inputs)
    allowed = allowed_errors(TRAIN, measure_errors(authors_step, inputs, truth), PROVIDERS["authors"], torch.bfloat16)
    assert find_problem(measure_errors(PROVIDERS[OURS].build(), inputs, truth), allowed) is None
    problem = find_problem(measure_errors(nearly_all_of_the_gradient, inputs, truth), allowed)
    assert problem is not None
    assert problem.startswith("wrong gradient in fp32")


def test_a_quick_run_reports_tokens_a_second_and_memory(tmp_path, capsys):
    arguments = ["--quick", "--device", "cpu", "--cases", "equal", "--providers", f"{OURS},authors"]
    assert main(TRAIN, [*arguments, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    with (tmp_path / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:  # the gradients alone are as large as the weights
        assert float(row["peak_bytes"]) >= float(row["bytes"]) / 11
        assert f"{32 / float(row['p50_ms']) * 1e3:.0f}" in printed
    assert (tmp_path / "train.png").exists()
