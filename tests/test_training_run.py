"""The real run: SmolLM2-135M on real preference pairs through the command line, against plain PyTorch."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dil_kernels.quickstart.embedded import embedded_pairs_path

ROOT = Path(__file__).parents[1]
MAX_LENGTH, BATCH, STEPS, LEARNING_RATE = 64, 2, 2, 2e-5
OPTIONS = {
    "max-steps": STEPS,
    "max-length": MAX_LENGTH,
    "per-device-train-batch-size": BATCH,
    "learning-rate": LEARNING_RATE,
    "lr-scheduler-type": "linear",
    "train-sampling-strategy": "sequential",
    "logging-steps": 1,
    "report-to": "none",
}


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:  # a run is several GB, which pytest would keep
        yield Path(directory)


def dil_train(model_dir: Path, pairs_file: Path, output_dir: Path, **more: Any) -> None:
    options = {"model": model_dir, "train-file": pairs_file, "output-dir": output_dir, **OPTIONS, **more}
    flags = [item for name, value in options.items() for item in (f"--{name}".replace("_", "-"), str(value))]
    result = subprocess.run(
        [sys.executable, "-m", "dil_kernels.cli", *flags],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def history(output_dir: Path) -> list[dict[str, float]]:
    return [log for log in json.loads((output_dir / "trainer_state.json").read_text())["log_history"] if "loss" in log]


def tokens(tokenizer: Any, pair: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
    """Prompt and response as the recipe has them: the end of the prompt stays, up to half of the length."""
    prompts = tokenizer(tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True))
    prompt = prompts["input_ids"]
    whole, other = (
        tokenizer(tokenizer.apply_chat_template(pair["prompt"] + pair[name], tokenize=False))["input_ids"]
        for name in (side, {"chosen": "rejected", "rejected": "chosen"}[side])
    )
    assert whole[: len(prompt)] == prompt
    response = whole[len(prompt) :]
    if max(len(whole), len(other)) > MAX_LENGTH:
        prompt = prompt[-MAX_LENGTH // 2 :]
    return prompt, response[: MAX_LENGTH - len(prompt)]


def plain_logps(model: Any, sequences: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Summed log-probs of the responses and their lengths, [2 BATCH]."""
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.tensor([p + r + [0] * (length - len(p) - len(r)) for p, r in sequences])
    attention = torch.tensor([[1] * len(p + r) + [0] * (length - len(p + r)) for p, r in sequences])
    scored = torch.tensor([[0] * len(p) + [1] * len(r) + [0] * (length - len(p + r)) for p, r in sequences])[:, 1:]
    logps = model(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (logps * scored).sum(1), scored.sum(1)


def plain_run(model_dir: Path, pairs_file: Path) -> list[dict[str, float]]:
    """The same steps with log_softmax, gather, autograd and torch.optim.AdamW: what each should have logged."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    policy, ref = (AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    with pairs_file.open() as file:
        pairs = [json.loads(next(file)) for _ in range(STEPS * BATCH)]
    logs = []
    for step in range(STEPS):
        batch = pairs[step * BATCH : (step + 1) * BATCH]
        sequences = [tokens(tokenizer, pair, side) for side in ("chosen", "rejected") for pair in batch]
        logps, lengths = plain_logps(policy, sequences)
        with torch.no_grad():
            ref_logps, _ = plain_logps(ref, sequences)
        u_w, u_l = ((logps - ref_logps) / lengths).chunk(2)
        loss = (-u_w.exp() + (2 * u_l).exp() / 2).mean()
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / STEPS)
        optimizer.step()
        chosen, rejected = logps.chunk(2)
        logs.append(
            {
                "loss": loss.item(),
                "grad_norm": grad_norm.item(),
                "rewards/chosen": u_w.mean().item(),
                "rewards/rejected": u_l.mean().item(),
                "logps/chosen": chosen.mean().item(),
                "logps/rejected": rejected.mean().item(),
            }
        )
    return logs


def assert_steps_equal(logged: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert abs(expected[1]["rewards/chosen"]) > 1e-3, "a policy that has not moved proves nothing"
    for step, (actual, truth) in enumerate(zip(logged, expected, strict=True)):
        for name, value in truth.items():
            assert actual[name] == pytest.approx(value, rel=1e-5, abs=5e-6), (step, name)


# One test, so that workers of pytest-xdist do not each make the run.
def test_a_run_is_that_of_plain_pytorch_and_resumes_exactly(smollm2_dir: Path, run_dir: Path) -> None:
    pairs_file = Path(os.environ.get("DIL_PREFERENCE_DATA") or embedded_pairs_path("train"))
    whole, resumed = run_dir / "whole", run_dir / "resumed"
    dil_train(smollm2_dir, pairs_file, whole, save_strategy="steps", save_steps=1)
    assert_steps_equal(history(whole), plain_run(smollm2_dir, pairs_file))

    checkpoint = whole / "checkpoint-1"
    dil_train(smollm2_dir, pairs_file, resumed, resume_from_checkpoint=checkpoint, save_strategy="no")
    assert filecmp.cmp(resumed / "model.safetensors", whole / "model.safetensors", shallow=False)
    assert not filecmp.cmp(resumed / "model.safetensors", checkpoint / "model.safetensors", shallow=False)
    names = ("step", "loss", "grad_norm", "learning_rate", "rewards/margins", "logps/chosen")
    for actual, expected in zip(history(resumed), history(whole), strict=True):
        assert {name: actual[name] for name in names} == {name: expected[name] for name in names}
