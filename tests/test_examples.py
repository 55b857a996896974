"""Every example runs as it is and learns; every function for another trainer gives the loss of the fused one."""

from __future__ import annotations

import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import make_model, make_pairs, make_tokenizer

from dil_kernels import fused_dil_loss, token_logps

pytest.importorskip("trl", reason="needs the extra [trl]")

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {  # the command, and how far its loss must fall in 20 steps
    "pytorch_loop": ("pytorch_loop.py", 0.2),
    "hf_trainer": ("hf_trainer.py", 0.15),
    "trl_trainer": ("trl_trainer.py", 0.15),
    "trl_trainer with LoRA": ("trl_trainer.py --lora --learning-rate 0.01", 0.01),  # the layers below are random
    "accelerate_loop": ("accelerate_loop.py", 0.2),
}


@pytest.fixture
def example_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "shared", raising=False)


@pytest.mark.parametrize(("command", "fall"), RUNS.values(), ids=RUNS)
def test_an_example_runs_and_learns(
    command: str,
    fall: float,
    example_path: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, *options = command.split()
    script = str(EXAMPLES / script)
    monkeypatch.setattr(sys, "argv", [script, *options, "--steps", "20"])
    runpy.run_path(script, run_name="__main__")
    losses = [float(value) for value in re.findall(r"\bloss'?:? '?(-?\d+\.\d+)", capsys.readouterr().out)]
    assert -0.65 < losses[0] <= -0.499, "LSIF is -1/2 where the policy is the reference"
    assert losses[-1] < losses[0] - fall


@dataclass
class Case:
    """A batch of three pairs as a trainer has it, and the truth."""

    logps: torch.Tensor  # [6, T - 1], 0 where not scored
    ref: torch.Tensor
    lengths: torch.Tensor  # [6]
    mask: torch.Tensor  # [6, T]
    loss: torch.Tensor
    losses: torch.Tensor
    gradient: torch.Tensor  # of the loss, in the logits
    logits: torch.Tensor

    def assert_same(self, loss: torch.Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss, self.logits)
        torch.testing.assert_close(loss, self.loss)
        torch.testing.assert_close(gradient, self.gradient)

    def means(self) -> tuple[torch.Tensor, ...]:
        policy, ref = self.logps.sum(1) / self.lengths, self.ref.sum(1) / self.lengths
        return (*policy.chunk(2), *ref.chunk(2))


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 6, 9, 20, generator=generator)
    labels = torch.randint(20, (6, 9), generator=generator)
    for row, (prompt, end) in enumerate([(2, 9), (3, 6), (1, 5), (4, 9), (2, 4), (3, 8)]):
        labels[row, :prompt] = labels[row, end:] = -100
    logits.requires_grad_()
    truth = fused_dil_loss(logits, labels, ref_logits=ref_logits, loss_type="lsif")
    (gradient,) = torch.autograd.grad(truth.loss, logits)
    mask = labels != -100
    return Case(
        token_logps(logits, labels),
        token_logps(ref_logits, labels),
        mask[:, 1:].sum(1),
        mask,
        truth.loss.detach(),
        truth.losses.detach(),
        gradient,
        logits,
    )


@pytest.fixture
def other_trainers(example_path: None) -> Any:
    import other_trainers

    return other_trainers


def test_openrlhf(other_trainers: Any, case: Case) -> None:
    prompts = [int(row.nonzero()[0]) for row in case.mask]
    attention_mask = (torch.arange(9) <= torch.tensor([int(row.nonzero()[-1]) for row in case.mask])[:, None]).long()

    def concatenated_forward(logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unmasked = torch.where(case.mask[:, 1:], logps, -7.0)  # OpenRLHF masks inside
        sums, _ = other_trainers.openrlhf_batch_logps(None, unmasked, attention_mask, prompts)
        return sums[:3], sums[3:]

    loss, chosen, rejected = other_trainers.openrlhf_loss(
        *concatenated_forward(case.logps), *concatenated_forward(case.ref)
    )
    assert chosen.shape == rejected.shape == (3,)
    case.assert_same(loss)


def test_llamafactory(other_trainers: Any, case: Case) -> None:
    losses, chosen, _ = other_trainers.llamafactory_dpo_loss(None, *case.means())
    torch.testing.assert_close(losses.detach(), case.losses)
    assert not chosen.requires_grad
    losses += 0.0 * losses.detach()  # LLaMA-Factory adds its sft term in place
    case.assert_same(losses.mean())


def test_swift(other_trainers: Any, case: Case) -> None:
    (chosen, rejected), (ref_chosen, ref_rejected) = case.logps.sum(1).chunk(2), case.ref.sum(1).chunk(2)
    counts = dict(zip(("chosen", "rejected"), case.lengths.chunk(2), strict=True))
    model_output = {f"{name}_completion_token_counts": value for name, value in counts.items()}
    losses, *_ = other_trainers.swift_dpo_loss(
        None, chosen, rejected, ref_chosen, ref_rejected, "sigmoid", model_output
    )
    case.assert_same(losses.mean())


def test_nemo(other_trainers: Any, case: Case) -> None:
    rewards = ((case.logps - case.ref).sum(1) / case.lengths).view(2, 3).T.reshape(6)  # interleaved
    loss, accuracy, chosen, rejected = other_trainers.nemo_preference_loss(
        None, rewards, torch.ones(6), torch.tensor(6)
    )
    case.assert_same(loss)
    assert accuracy == (rewards[0::2] > rewards[1::2]).float().mean()
    torch.testing.assert_close(torch.stack([chosen, rejected]), rewards.detach().view(3, 2).mean(0))
    masked, *_ = other_trainers.nemo_preference_loss(None, rewards, torch.tensor([1.0, 1, 0, 0, 1, 1]), torch.tensor(4))
    torch.testing.assert_close(masked.detach(), case.losses[[0, 2]].mean())


def test_axolotl(example_path: None, tmp_path: Path) -> None:
    from axolotl_trainer import LSIFTrainer
    from trl import DPOConfig

    @dataclass
    class AxolotlDPOConfig(DPOConfig):  # the launcher's options come along
        dataset_tags: str | None = None

    args = AxolotlDPOConfig(
        str(tmp_path), dataset_tags="x", max_steps=2, logging_steps=1, bf16=False, use_cpu=True, report_to=[]
    )
    trainer = LSIFTrainer(
        make_model(0), make_model(0), args=args, train_dataset=make_pairs(4), processing_class=make_tokenizer()
    )
    trainer.train()
    assert trainer.args.dataset_tags == "x"
    assert args.loss_type == ["sigmoid"]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(-0.5)
