"""What each loss converges to where every expectation is a sum: does it recover the chosen responses' distribution?

    python -m experiments.tabular_consistency            # about a minute
    python -m experiments.tabular_consistency --quick    # fewer tables and samples; seconds

Two ways to draw the rejected response y_l: from pi_ref itself, and from a distribution of its own with
pi_ref = (chosen + rejected)/2, as when the reference was fine-tuned on both responses. Losses are every registered
divergence and DPO; then each divergence by the links that see the difference of a pair only. Policies are tables,
fitted by Newton's method in fp64.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dil_kernels.losses import LossOptions
from dil_kernels.losses.options import LINKS
from experiments.tables import RESULTS, mean_and_sd, write_csv
from experiments.tabular_figure import draw
from experiments.tabular_problem import (
    DIVERGENCES,
    FROM_REFERENCE,
    FROM_REJECTED,
    SETUPS,
    Loss,
    Table,
    arrange,
    make_table,
    sample,
    solve,
    total_variation,
)

ALPHAS = (0.0, 0.25, 0.5, 0.75)
BETAS = (0.1, 0.5, 1.0, 2.0)
LINK_BETAS = (0.5, 1.0)
ROUTES = ("one-stage", "two-stage")


@dataclass(frozen=True)
class Settings:
    """How much is computed."""

    seeds: int
    prompts: int
    responses: int
    sample_sizes: tuple[int, ...]


FULL = Settings(seeds=10, prompts=8, responses=8, sample_sizes=(1_000, 10_000, 100_000, 1_000_000))
QUICK = Settings(seeds=2, prompts=3, responses=5, sample_sizes=(1_000, 100_000))


def main(argv: Sequence[str] | None = None) -> int:
    """Solve everything; write the tables and the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tabular_consistency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer seeds, smaller tables")
    parser.add_argument(
        "--output", type=Path, help="folder of the results (default: experiments/results for a full run)"
    )
    options = parser.parse_args(argv)
    settings = QUICK if options.quick else FULL
    output = options.output or (Path("runs/tabular_consistency") if options.quick else RESULTS)

    population, sampled = population_rows(settings), sampled_rows(settings)
    summary = summarise(population, ("setup", "route", "loss", "alpha", "beta"))
    sampled_summary = summarise(sampled, ("setup", "loss", "alpha", "beta", "samples"))
    write_csv(output / "tabular_consistency.csv", population)
    write_csv(output / "tabular_consistency_summary.csv", summary)
    write_csv(output / "tabular_consistency_sampled.csv", sampled)
    write_csv(output / "tabular_links.csv", link_rows(settings))
    draw(summary, sampled_summary, output / "tabular_consistency.png")
    print(f"results in {output}")
    return 0


def losses(setup: str) -> Iterator[Loss]:
    """Every registered divergence, and dpo, with the options that make sense in a set-up."""
    for name in DIVERGENCES:
        # Where y_l comes from pi_ref, the rejected responses alone are the reference expectation.
        yield from (Loss(name, alpha=alpha) for alpha in (ALPHAS if setup == FROM_REJECTED else (0.0,)))
    yield from (Loss("dpo", beta=beta) for beta in BETAS)


def population_rows(settings: Settings) -> list[dict[str, Any]]:
    """The optimum of every loss under the exact distributions; tables of all seeds are solved at once."""
    tables = stack_tables(settings)
    rows = []
    for setup in SETUPS:
        rejected, reference = arrange(tables, setup)
        for loss in losses(setup):
            for route in ROUTES:
                solution = solve(loss, tables.chosen, rejected, reference, two_stage=route == "two-stage")
                values = {
                    "tv_to_chosen": total_variation(solution.policy, tables.chosen),
                    "tv_to_formula": total_variation(
                        solution.policy, formula(loss, tables.chosen, rejected, reference)
                    ),
                    "normaliser": solution.normaliser,
                    "gradient_norm": solution.gradient_norm,
                }
                rows += [
                    {"setup": setup, "route": route, **describe(loss), "seed": seed}
                    | {name: value.view(settings.seeds, -1)[seed].mean().item() for name, value in values.items()}
                    for seed in range(settings.seeds)
                ]
    return rows


def formula(loss: Loss, chosen: Tensor, rejected: Tensor, reference: Tensor) -> Tensor:
    """Where the unconstrained optimum of a loss lies, normalised to a policy [N, V].

    A separable loss: pi_ref r with r = chosen / (alpha chosen + (1 - alpha) rejected). DPO: pi_ref
    (chosen / rejected)^(1/beta), since its pairs are then logistic in the difference of beta u.
    """
    if loss.beta is not None:
        ratio = (chosen / rejected) ** (1.0 / loss.beta)
    else:
        ratio = chosen / (loss.alpha * chosen + (1.0 - loss.alpha) * rejected)
    policy = reference * ratio
    return policy / policy.sum(-1, keepdim=True)


def sampled_rows(settings: Settings) -> list[dict[str, Any]]:
    """Fits to samples in place of the exact distributions: as many y_w and y_l a prompt, in the unbiased settings."""
    tables = stack_tables(settings)
    rows = []
    for setup in SETUPS:
        rejected, reference = arrange(tables, setup)
        for count in settings.sample_sizes:
            generator = torch.Generator().manual_seed(count)
            drawn = sample(tables.chosen, count, generator), sample(rejected, count, generator)
            for loss in losses(setup):
                if setup == FROM_REFERENCE:
                    unbiased = loss.beta in (None, 1.0)
                else:
                    unbiased = loss.beta is None and loss.alpha == 0.5
                if not unbiased:
                    continue
                solution = solve(loss, *drawn, reference)
                distance = total_variation(solution.policy, tables.chosen).view(settings.seeds, -1)
                rows += [
                    {"setup": setup, **describe(loss), "samples": count, "seed": seed}
                    | {"tv_to_chosen": distance[seed].mean().item()}
                    for seed in range(settings.seeds)
                ]
    return rows


def link_rows(settings: Settings) -> list[dict[str, Any]]:
    """The optimum of every divergence by the links of pairs under the exact distributions, averaged over the seeds.

    There beta s(u) is log(chosen / rejected) up to a constant for each prompt, with s(u) = u for the ratio link and
    A(u) for f_dpo: `residual` is by how much it is not, in nats.
    """
    tables = stack_tables(settings)
    rows = []
    for setup, link, name, beta in itertools.product(SETUPS, LINKS[1:], DIVERGENCES, LINK_BETAS):
        rejected, reference = arrange(tables, setup)
        solution = solve(Loss(name, beta=beta, link=link), tables.chosen, rejected, reference)
        u = (solution.policy / reference).log()
        score = u if link == "ratio" else LossOptions(loss_type=name).parameters.term("A", u)
        residual = beta * score - (tables.chosen / rejected).log()
        distance = total_variation(solution.policy, tables.chosen).view(settings.seeds, -1).mean(1)
        mean, sd = mean_and_sd(distance.tolist())
        options = {"setup": setup, "link": link, "loss": name, "beta": beta}
        rows.append(
            options | {"tv_mean": mean, "tv_sd": sd, "residual": (residual.amax(1) - residual.amin(1)).max().item()}
        )
    return rows


def stack_tables(settings: Settings) -> Table:
    """The tables of all seeds, one below the other."""
    tables = [make_table(seed, settings.prompts, settings.responses) for seed in range(settings.seeds)]
    return Table(*(torch.cat([getattr(table, name) for table in tables]) for name in Table.__dataclass_fields__))


def describe(loss: Loss) -> dict[str, Any]:
    """The columns that name a loss; an option that it does not have is empty."""
    if loss.beta is not None:
        return {"loss": loss.loss_type, "alpha": "", "beta": loss.beta}
    return {"loss": loss.loss_type, "alpha": loss.alpha, "beta": ""}


def summarise(rows: Sequence[dict[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of the distance to the chosen distribution."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row["tv_to_chosen"])
    return [
        dict(zip(by, key, strict=True))
        | dict(zip(("tv_mean", "tv_sd"), mean_and_sd(values), strict=True))
        | {"tv_max": max(values), "seeds": len(values)}
        for key, values in groups.items()
    ]


if __name__ == "__main__":
    raise SystemExit(main())
