"""Runs of one experiment beside each other, on the same held-out pairs.

A run is a mapping with arm, seed, held_out - evaluations, with step, margin and log_ratios [pairs, 2] of whole
responses, chosen ones first - and lengths [pairs, 2] in tokens. Errors take pairs as independent, as those of
different prompts are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Held-out margins at which runs are compared, in nats: of averages over tokens, and of whole responses.
MARGINS = {"token": (0.02, 0.05, 0.1, 0.2, 0.4, 0.8), "response": (5.0, 10.0, 20.0, 40.0, 80.0, 160.0)}
RESAMPLES = 1000
ENOUGH = 0.95  # of the resamples must reach a margin for a standard error
Runs = Sequence[Mapping[str, Any]]


def differences(runs: Runs, baseline: str) -> list[dict[str, Any]]:
    """Pairs won at the end, by log ratios a token and by those of whole responses, more than by a baseline.

    Means over the seeds of both. The standard error is over pairs: another draw of pairs, not of seeds.
    """
    won = {
        (run["arm"], run["seed"]): np.array([_log_ratios(run, unit)[-1] @ [1.0, -1.0] > 0 for unit in MARGINS], float)
        for run in runs
    }
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs if run["arm"] != baseline):
        more = [won[arm, seed] - won[baseline, seed] for of, seed in won if of == arm and (baseline, seed) in won]
        if not more:
            continue
        row: dict[str, Any] = {"arm": arm, "seeds": len(more)}
        for name, of_pairs in zip(("accuracy", "response_accuracy"), np.mean(more, axis=0), strict=True):
            row[name] = float(of_pairs.mean())
            row[f"{name}_standard_error"] = float(of_pairs.std(ddof=1) / len(of_pairs) ** 0.5)
        rows.append(row)
    return rows


def same_loss(runs: Runs, baseline: str, others: Sequence[str]) -> list[dict[str, Any]]:
    """How far arms are from a baseline at each evaluation: the largest difference of a log ratio, in nats."""
    by_key = {(run["arm"], run["seed"]): run for run in runs}
    rows = []
    for arm, seed in [(arm, seed) for arm, seed in by_key if arm in others and (baseline, seed) in by_key]:
        pair = by_key[baseline, seed], by_key[arm, seed]
        for ours, theirs in zip(*(run["held_out"] for run in pair), strict=True):
            first, second = (np.array(entry["log_ratios"]) for entry in (ours, theirs))
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "step": ours["step"],
                    "largest_difference": float(np.abs(first - second).max()),
                    "largest_log_ratio": float(np.abs(second).max()),
                    "difference_of_margins": ours["margin"] - theirs["margin"],
                }
            )
    return rows


def at_equal_margins(runs: Runs, baseline: str) -> list[dict[str, Any]]:
    """The change of the chosen responses' log-probs where each run first has a margin, by linear interpolation.

    A run has rows for the margins that it reaches; with the baseline those of its seed are compared. Standard errors
    are of the draw of held-out pairs, by bootstrap with the same draws for all runs; empty where a margin is not
    reached in nearly all draws.
    """
    pairs = len(runs[0]["lengths"])
    draws = np.random.default_rng(0).integers(pairs, size=(RESAMPLES, pairs))
    weights = np.stack([np.full(pairs, 1 / pairs), *(np.bincount(draw, minlength=pairs) / pairs for draw in draws)])
    rows: list[dict[str, Any]] = []
    for unit, margins in MARGINS.items():
        means = {(run["arm"], run["seed"]): weights @ _log_ratios(run, unit) for run in runs}
        for margin in margins:
            changes = {key: chosen_at(of_run, margin) for key, of_run in means.items()}
            for (arm, seed), (change, *drawn) in changes.items():
                if np.isnan(change):
                    continue
                row = {"arm": arm, "seed": seed, "unit": unit, "margin": margin, "chosen_logp_change": float(change)}
                row["standard_error"] = _error(np.array(drawn))
                more = changes[arm, seed] - changes.get((baseline, seed), np.nan)
                compared = arm != baseline and not np.isnan(more[0])
                row["beside_baseline"] = float(more[0]) if compared else ""
                row["beside_baseline_standard_error"] = _error(more[1:]) if compared else ""
                rows.append(row)
    return rows


def chosen_at(means: np.ndarray, margin: float) -> np.ndarray:
    """Means of the chosen responses' log ratios where a run first has a margin.

    Args:
        means: of log ratios [evaluations, draws, 2], chosen ones first; at the first evaluation all are 0.
        margin: more than 0.

    Returns:
        [draws], NaN where the margin is never reached.
    """
    chosen, rejected = means[..., 0], means[..., 1]
    margins = chosen - rejected
    reached = margins >= margin
    after, column = reached.argmax(0), np.arange(means.shape[1])
    before = np.maximum(after - 1, 0)
    start, end = margins[before, column], margins[after, column]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (margin - start) / (end - start)
        change = chosen[before, column] + share * (chosen[after, column] - chosen[before, column])
    return np.where(reached.any(0), change, np.nan)


def _log_ratios(run: Mapping[str, Any], unit: str) -> np.ndarray:  # [evaluations, pairs, 2]
    ratios = np.array([entry["log_ratios"] for entry in run["held_out"]])
    return ratios / np.array(run["lengths"]) if unit == "token" else ratios


def _error(drawn: np.ndarray) -> float | str:
    known = drawn[~np.isnan(drawn)]
    return float(known.std(ddof=1)) if len(known) > ENOUGH * len(drawn) else ""
