"""The training runs of the training-dynamics experiment: one loss, learning rate and seed each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dil_kernels import dil_loss
from experiments.tables import write_record
from experiments.upper_blocks import CachedPair, all_pair_logps, batches, pair_logps


@dataclass(frozen=True)
class Arm:
    """A way to train: a loss with its options, and whether log ratios are divided by the number of scored tokens."""

    name: str
    loss_type: str
    alpha: float = 0.0
    beta: float | None = None
    average_log_prob: bool = True


ARMS = (
    Arm("lsif", "lsif"),
    Arm("ukl", "ukl"),
    Arm("bce", "bce"),
    Arm("lsif, alpha 1/2", "lsif", alpha=0.5),
    Arm("bce, alpha 1/2", "bce", alpha=0.5),
    Arm("dpo, beta 1", "dpo", beta=1.0),
    Arm("dpo, beta 0.1, sums", "dpo", beta=0.1, average_log_prob=False),
)


@dataclass(frozen=True)
class Settings:
    """How much is trained, and how."""

    tuning_steps: int  # of the runs that choose a learning rate, all of the first seed
    steps: int
    eval_every: int
    warmup_steps: int
    batch_size: int  # pairs
    trained_blocks: int
    learning_rates: tuple[float, ...]
    higher_rates: tuple[float, ...]  # shown, not chosen from
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Splits:
    """The cached pairs: training, validation (chooses the learning rate) and held-out (is reported)."""

    train: Sequence[CachedPair]
    validation: Sequence[CachedPair]
    held_out: Sequence[CachedPair]


class Runner:
    """Trains the upper blocks again and again from the same weights, and keeps what was measured on disk.

    Args:
        upper: from `take_upper_blocks`; its weights as given are the reference and the start of every run.
        splits: the cached pairs.
        settings: what all runs share.
        directory: where each finished run is kept; a run that is there is not repeated.

    Raises:
        ValueError: the directory holds runs with other settings.
    """

    def __init__(self, upper: nn.Module, splits: Splits, settings: Settings, directory: Path) -> None:
        self.upper = upper
        self.settings = settings
        self.directory = directory
        self.initial = {name: value.clone() for name, value in upper.named_parameters() if value.requires_grad}
        self.splits = Splits(*(self._with_reference(getattr(splits, name)) for name in Splits.__dataclass_fields__))
        self.at_start = self.evaluate(self.splits.held_out)
        self._claim_directory()

    def _with_reference(self, pairs: Sequence[CachedPair]) -> list[CachedPair]:
        pairs = sorted(pairs, key=lambda pair: len(pair.chosen.labels))  # little padding
        logps = all_pair_logps(self.upper, pairs).double().T.tolist()
        return [
            replace(pair, ref_logps=(chosen, rejected)) for pair, (chosen, rejected) in zip(pairs, logps, strict=True)
        ]

    def _claim_directory(self) -> None:
        record = asdict(self.settings) | {name: len(pairs) for name, pairs in vars(self.splits).items()}
        del record["learning_rates"], record["higher_rates"], record["seeds"]  # more of them may be added
        path = self.directory / "settings.json"
        if path.is_file() and json.loads(path.read_text()) != record:
            raise ValueError(f"{self.directory} holds runs with other settings; remove it or name another")
        self.directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")

    def run(self, arm: Arm, learning_rate: float, seed: int, *, tuning: bool = False) -> dict[str, Any]:
        """The record of one run, from disk if it is there; a tuning run is shorter and sees no held-out pair."""
        kind = "tuning" if tuning else "run"
        name = f"{kind} {arm.name} lr {learning_rate:g} seed {seed}"
        path = self.directory / (name.replace("/", "-").replace(",", "").replace(" ", "_") + ".json")
        if not path.is_file():
            record = self._train(arm, learning_rate, seed, tuning)
            write_record(path, record)
            print(f"{name}: {record['seconds']:.0f} s", flush=True)
        return json.loads(path.read_text())

    def _train(self, arm: Arm, learning_rate: float, seed: int, tuning: bool) -> dict[str, Any]:
        start = time.monotonic()
        with torch.no_grad():
            for name, value in self.upper.named_parameters():
                if name in self.initial:
                    value.copy_(self.initial[name])
        parameters = [value for value in self.upper.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        warmup = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1 / self.settings.warmup_steps, 1.0, self.settings.warmup_steps - 1
        )
        gradient_norm = float("nan")
        train_loss: list[float] = []
        held_out = [] if tuning else [{"step": 0} | self.at_start]
        steps = self.settings.tuning_steps if tuning else self.settings.steps
        for step, batch in enumerate(self._training_batches(seed, steps), start=1):
            loss = batch_loss(self.upper, batch, arm)
            train_loss.append(loss.item())
            if not loss.isfinite():
                break
            optimizer.zero_grad()
            loss.backward()
            gradients = [value.grad for value in parameters]
            if step == 1:
                gradient_norm = float(nn.utils.get_total_norm(gradients))
            # Every run's loss is scaled so that its first gradient has norm 1.
            torch._foreach_div_(gradients, gradient_norm)
            optimizer.step()
            warmup.step()
            if step % self.settings.eval_every == 0 and not tuning:
                held_out.append({"step": step} | self.evaluate(self.splits.held_out))
        return {
            "arm": arm.name,
            "tuning": tuning,
            "learning_rate": learning_rate,
            "seed": seed,
            "initial_gradient_norm": gradient_norm,
            "train_loss": train_loss,
            "held_out": held_out,
            "validation": self.evaluate(self.splits.validation) if tuning else None,
            "seconds": time.monotonic() - start,
        }

    def _training_batches(self, seed: int, steps: int) -> Iterator[Sequence[CachedPair]]:
        """As many batches as steps, over the data in turns; the same for every arm and learning rate of a seed."""
        generator = torch.Generator().manual_seed(seed)
        needed = steps * self.settings.batch_size
        order: list[int] = []
        while len(order) < needed:
            order += torch.randperm(len(self.splits.train), generator=generator).tolist()
        return batches([self.splits.train[index] for index in order[:needed]], self.settings.batch_size)

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[CachedPair]) -> dict[str, float]:
        """Means over pairs; log-probs and log ratios are per token, in nats."""
        logps = all_pair_logps(self.upper, pairs).double()
        return metrics(logps, _reference(pairs), _lengths(pairs))


def choose_learning_rate(grid: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate with the best validation accuracy (chosen likelier per token); the lowest of equals."""
    best = max(grid, key=lambda record: (record["validation"]["likelihood_accuracy"], -record["learning_rate"]))
    return best["learning_rate"]


def batch_loss(upper: nn.Module, pairs: Sequence[CachedPair], arm: Arm) -> Tensor:
    """Mean loss of a batch of pairs."""
    policy = pair_logps(upper, pairs).view(2, -1)
    reference = _reference(pairs).to(policy.dtype)
    if arm.average_log_prob:
        lengths = _lengths(pairs)
        policy, reference = policy / lengths, reference / lengths
    loss, _, _ = dil_loss(
        *policy, *reference, loss_type=arm.loss_type, alpha=arm.alpha, beta=arm.beta, reduction="mean"
    )
    return loss


def metrics(logps: Tensor, ref_logps: Tensor, lengths: Tensor) -> dict[str, float]:
    """What is reported, from summed log-probs [2, P] of policy and reference and scored tokens [2, P]."""
    chosen, rejected = logps / lengths
    chosen_ratio, rejected_ratio = (logps - ref_logps) / lengths
    values: Mapping[str, Tensor] = {
        "chosen_logp": chosen,
        "rejected_logp": rejected,
        "chosen_logratio": chosen_ratio,
        "rejected_logratio": rejected_ratio,
        "margin": chosen_ratio - rejected_ratio,
        "reward_accuracy": (chosen_ratio > rejected_ratio).double(),
        "likelihood_accuracy": (chosen > rejected).double(),
    }
    return {name: value.mean().item() for name, value in values.items()}


def _reference(pairs: Sequence[CachedPair]) -> Tensor:  # [2, P] fp64
    return torch.tensor([pair.ref_logps for pair in pairs], dtype=torch.float64).T


def _lengths(pairs: Sequence[CachedPair]) -> Tensor:  # [2, P]
    return torch.tensor([pair.lengths for pair in pairs]).T
