"""How often training diverges, over learning rate and response length, for summed and averaged log ratios.

    python -m experiments.stability            # minutes: every registered loss
    python -m experiments.stability --quick    # a corner of the grid; seconds

The policy is a bigram language model (a table of V x V logits) in fp32, trained with Adam and without gradient
clipping on pairs that two other bigram models wrote, none seen twice. A run has diverged if a training loss was not
finite ("non-finite"), or if at its end the held-out chosen responses are less likely than under uniform guessing
("unlearned").
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dil_kernels import dil_loss
from experiments.tables import RESULTS, mean_and_sd, write_csv
from experiments.tabular_problem import DIVERGENCES

VOCABULARY = 16
BATCH_SIZE = 8  # pairs
HELD_OUT_RESPONSES = 64
MAX_LOG_RATIO = 10.0
DPO_BETAS = (0.1, 1.0)
REDUCTIONS = ("sum", "mean")  # of the log ratio over the tokens of a response
BOUNDS: dict[str, dict[str, float]] = {
    "none": {},
    "alpha = 1/2": {"alpha": 0.5},
    f"max_log_ratio = {MAX_LOG_RATIO:g}": {"max_log_ratio": MAX_LOG_RATIO},
}


@dataclass(frozen=True)
class Settings:
    """How much is trained."""

    seeds: int
    steps: int
    lengths: tuple[int, ...]  # tokens of a response
    learning_rates: tuple[float, ...]


FULL = Settings(
    seeds=10, steps=100, lengths=(16, 64, 256, 1024), learning_rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
)
QUICK = Settings(seeds=2, steps=40, lengths=(16, 512), learning_rates=(0.003, 1.0))


@dataclass(frozen=True)
class Data:
    """What S seeds train on: bigram counts of responses, which are all that their log-probs depend on."""

    reference: Tensor  # [S, V, V] logits
    chosen: Tensor  # [S, steps * BATCH_SIZE, V, V] counts; no pair is seen twice
    rejected: Tensor  # likewise
    held_out: Tensor  # [S, HELD_OUT_RESPONSES, V, V] counts of chosen responses


def main(argv: Sequence[str] | None = None) -> int:
    """Train everything; write the tables and the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.stability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a corner of the grid")
    parser.add_argument("--output", type=Path, help="folder of the results (default: experiments/results if not quick)")
    options = parser.parse_args(argv)
    settings = QUICK if options.quick else FULL
    output = options.output or (Path("runs/stability") if options.quick else RESULTS)

    from experiments.stability_figure import draw

    rows = run_grid(settings)
    write_csv(output / "stability.csv", rows)
    write_csv(output / "stability_summary.csv", summarise(rows))
    draw(rows, output / "stability.png")
    print(f"{len(rows) * settings.seeds} runs; results in {output}")
    return 0


@dataclass(frozen=True)
class Arm:
    """A loss, how its log ratios are reduced, and its bound."""

    loss_type: str
    reduction: str
    bound: str
    beta: float | None = None

    @property
    def name(self) -> str:
        """The loss with its beta, if it has one."""
        return self.loss_type if self.beta is None else f"{self.loss_type}, beta {self.beta:g}"


def arms() -> Iterator[Arm]:
    """Every registered divergence, and dpo, with every bound that it takes."""
    for loss_type in (*DIVERGENCES, "dpo"):
        for reduction in REDUCTIONS:
            for bound, options in BOUNDS.items():
                if loss_type == "dpo":
                    betas = () if "alpha" in options else DPO_BETAS
                    yield from (Arm(loss_type, reduction, bound, beta) for beta in betas)
                else:
                    yield Arm(loss_type, reduction, bound)


def run_grid(settings: Settings) -> list[dict[str, Any]]:
    """One row for each arm, length and learning rate: how many of the seeds diverged, and how."""
    rows = []
    for length in settings.lengths:
        data = make_data(settings.seeds, settings.steps * BATCH_SIZE, length)
        for arm in arms():
            finite, change, likely = train(data, settings, arm)
            for index, learning_rate in enumerate(settings.learning_rates):
                unlearned = finite[index] & ~likely[index]
                kept = change[index][finite[index] & likely[index]].tolist()
                mean, sd = mean_and_sd(kept) if kept else ("", "")
                rows.append(
                    {
                        "loss": arm.name,
                        "reduction": arm.reduction,
                        "bound": arm.bound,
                        "tokens": length,
                        "learning_rate": learning_rate,
                        "runs": settings.seeds,
                        "non_finite": int((~finite[index]).sum()),
                        "unlearned": int(unlearned.sum()),
                        "chosen_logp_change_of_others": mean,
                        "chosen_logp_change_sd": sd,
                    }
                )
    return rows


def make_data(seeds: int, pairs: int, length: int) -> Data:
    """Responses of `length` tokens of models near the reference, one for the chosen and one for the rejected."""
    per_seed = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        reference, towards_chosen, towards_rejected = torch.randn(3, VOCABULARY, VOCABULARY, generator=generator)
        chosen, rejected = reference + 0.5 * towards_chosen, reference + 0.5 * towards_rejected
        per_seed.append(
            (
                reference,
                bigram_counts(chosen, pairs, length, generator),
                bigram_counts(rejected, pairs, length, generator),
                bigram_counts(chosen, HELD_OUT_RESPONSES, length, generator),
            )
        )
    return Data(*(torch.stack(parts) for parts in zip(*per_seed, strict=True)))


def bigram_counts(logits: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """How often each pair of neighbours occurs [count, V, V] in sequences that a bigram model [V, V] writes."""
    probabilities = logits.softmax(-1)
    counts = torch.zeros(count, VOCABULARY * VOCABULARY)
    tokens = torch.randint(VOCABULARY, (count,), generator=generator)
    for _ in range(length):
        following = torch.multinomial(probabilities[tokens], 1, generator=generator).squeeze(1)
        counts.scatter_add_(1, (tokens * VOCABULARY + following)[:, None], torch.ones(count, 1))
        tokens = following
    return counts.view(count, VOCABULARY, VOCABULARY)


def train(data: Data, settings: Settings, arm: Arm) -> tuple[Tensor, Tensor, Tensor]:
    """Train one policy for each learning rate (L) and seed (S), all at once: no run sees another's numbers.

    Returns:
        Each [L, S]: whether every training loss was finite; the change of the held-out chosen log-prob, nats a token;
        whether that log-prob ended above that of uniform guessing.
    """
    length = float(data.held_out[0, 0].sum())
    divisor = length if arm.reduction == "mean" else 1.0
    reference = data.reference.log_softmax(-1)
    policies = [data.reference.clone().requires_grad_() for _ in settings.learning_rates]  # [S, V, V] each
    optimizer = torch.optim.Adam(
        [{"params": [policy], "lr": rate} for policy, rate in zip(policies, settings.learning_rates, strict=True)]
    )
    finite = torch.ones(len(policies), len(data.reference), dtype=torch.bool)
    for chosen, rejected in zip(data.chosen.split(BATCH_SIZE, 1), data.rejected.split(BATCH_SIZE, 1), strict=True):
        drift = torch.stack(policies).log_softmax(-1) - reference  # [L, S, V, V]
        u_w, u_l = (torch.einsum("lsvw,sbvw->lsb", drift, counts) / divisor for counts in (chosen, rejected))
        zeros = torch.zeros(u_w.numel())
        losses, _, _ = dil_loss(
            u_w.flatten(), u_l.flatten(), zeros, zeros, loss_type=arm.loss_type, beta=arm.beta, **BOUNDS[arm.bound]
        )
        per_run = losses.view_as(u_w).mean(-1)  # [L, S]
        finite &= per_run.detach().isfinite()
        optimizer.zero_grad()
        per_run.sum().backward()
        optimizer.step()
    with torch.no_grad():
        after = torch.stack(policies).log_softmax(-1)
        end, start = (
            torch.einsum("lsvw,spvw->ls", logps, data.held_out) / (length * HELD_OUT_RESPONSES)
            for logps in (after, reference.expand_as(after))
        )
    return finite & end.isfinite(), end - start, end > -math.log(VOCABULARY)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each arm and length: the share of diverged runs, and the highest learning rate of which none diverged."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["loss"], row["reduction"], row["bound"], row["tokens"]), []).append(row)
    summary = []
    for (loss_type, reduction, bound, length), group in groups.items():
        runs = sum(row["runs"] for row in group)
        safe = [row["learning_rate"] for row in group if not row["non_finite"] + row["unlearned"]]
        summary.append(
            {
                "loss": loss_type,
                "reduction": reduction,
                "bound": bound,
                "tokens": length,
                "non_finite_share": sum(row["non_finite"] for row in group) / runs,
                "unlearned_share": sum(row["unlearned"] for row in group) / runs,
                "highest_rate_without_divergence": max(safe, default=""),
            }
        )
    return summary


if __name__ == "__main__":
    raise SystemExit(main())
