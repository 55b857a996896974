"""The smallest learning rate at which training on real pairs fails, for each loss on averages and on sums.

    python -m experiments.failing_rates --pairs pairs.jsonl    # SmolLM2-135M, full fine-tuning; resumable
    python -m experiments.failing_rates --quick                # a tiny random model; seconds

The optimizer is as by default in `DILTrainer`: AdamW, a linear schedule without warm-up, gradients clipped to a norm
of 1. A run has failed if a loss or gradient norm was not finite ("non-finite"), or if at its end the held-out chosen
responses are less likely than before by more than a nat a token ("unlearned"). The rate is found by bisection on a grid
of two steps a decade, on the assumption that where one rate fails, higher ones do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.beside_trl_runs import Evaluation, load_model, make_problem, tokenized
from experiments.scorer import Scorer
from experiments.tables import RESULTS, write_csv, write_record

RATES = tuple(float(f"{digit}e{exponent}") for exponent in range(-6, 0) for digit in (1, 3))
LOST = 1.0  # nats a token by which the held-out chosen responses may become less likely


class Arm(NamedTuple):
    """A loss on averaged or summed log ratios."""

    name: str
    reduction: str
    options: Mapping[str, Any]  # of `DILConfig`


LOSSES: dict[str, dict[str, Any]] = {
    "lsif": {"loss_type": "lsif"},
    "ukl": {"loss_type": "ukl"},
    "bce": {"loss_type": "bce"},
    "dpo, beta 0.1": {"loss_type": "dpo", "beta": 0.1},
}
ARMS = tuple(
    Arm(name, reduction, {**options, "average_log_prob": reduction == "mean"})
    for name, options in LOSSES.items()
    for reduction in ("mean", "sum")
)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that bisection asks for; write the tables."""
    options = parse_options(argv)
    arms = ARMS[:2] if options.quick else ARMS
    rows, summary = [], []
    for arm in arms:
        tried: dict[float, dict[str, Any]] = {}

        def fails(rate: float, arm: Arm = arm, tried: dict[float, dict[str, Any]] = tried) -> bool:
            tried[rate] = _kept(arm, rate, options)
            print(f"{arm.name} on {arm.reduction}s, learning rate {rate:g}: {tried[rate]}", flush=True)
            return tried[rate]["outcome"] != "held"

        failing = smallest_failing(RATES[3::4] if options.quick else RATES, fails)
        rows += [
            {"loss": arm.name, "reduction": arm.reduction, "learning_rate": rate, **tried[rate]}
            for rate in sorted(tried)
        ]
        summary.append(
            {
                "loss": arm.name,
                "reduction": arm.reduction,
                "highest_rate_that_holds": max(
                    (rate for rate in tried if failing is None or rate < failing), default=""
                ),
                "smallest_rate_that_fails": "" if failing is None else failing,
                "how": "" if failing is None else tried[failing]["outcome"],
            }
        )
        write_csv(options.output / "failing_rates.csv", rows)
        write_csv(options.output / "failing_rates_summary.csv", summary)
    return 0


def smallest_failing(rates: Sequence[float], fails: Callable[[float], bool]) -> float | None:
    """The smallest of ascending rates that fails, if every rate above a failing one does; None if none fails."""
    low, high = 0, len(rates)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(rates[middle]) else (middle + 1, high)
    return rates[low] if low < len(rates) else None


def _kept(arm: Arm, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """The outcome of a run, which is made if it is not kept."""
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("output", "runs_dir")}
    key = hashlib.sha256(json.dumps([arm, rate, settings]).encode()).hexdigest()[:16]
    path = options.runs_dir / f"{key}.json"
    if not path.is_file():
        write_record(path, train(arm, rate, options))
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept


def train(arm: Arm, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train the model on some steps, and say what became of it."""
    from dil_kernels.trainer import DILConfig, DILTrainer

    problem = make_problem(*load_model(options.model, quick=options.quick), options.pairs, options.max_length)
    judged = tokenized(problem.judged, problem.tokenizer, options.max_length)
    evaluation = Evaluation(Scorer(problem.model), judged)
    with tempfile.TemporaryDirectory() as folder:
        config = DILConfig(
            folder,
            learning_rate=rate,
            per_device_train_batch_size=options.batch_size,
            max_steps=options.steps,
            max_length=options.max_length,
            precompute_ref_log_probs=True,
            prefix_sharing=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **arm.options,
        )
        trainer = DILTrainer(
            problem.model, args=config, train_dataset=problem.train, processing_class=problem.tokenizer
        )
        try:
            trainer.train()
            finite = True
        except FloatingPointError:  # of the trainer, at a loss that is not finite
            finite = False
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    finite = finite and all(math.isfinite(entry["grad_norm"]) for entry in steps)
    changes = {
        f"{name}_change": after - evaluation.start[name]
        for name, after in evaluation().items()
        if name in ("chosen_logp", "rejected_logp")
    }
    change = changes["chosen_logp_change"]
    outcome = "held" if change >= -LOST else "unlearned"
    if not (finite and math.isfinite(change)):
        outcome = "non-finite"
    return {
        "outcome": outcome,
        **changes,
        "largest_grad_norm": max((entry["grad_norm"] for entry in steps), default=math.nan),
    }


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.failing_rates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a tiny random model on made-up pairs, two losses")
    parser.add_argument("--model", type=Path, help="a model directory (default: SmolLM2-135M, prepared under runs/)")
    parser.add_argument("--pairs", type=Path, help="preference pairs (default: the embedded ones)")
    parser.add_argument("--max-length", type=int, default=512, help="longer pairs are left out (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="pairs a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="of a run (default: %(default)s)")
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs/failing_rates"), help="where finished runs are kept"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse_args(argv)
    if options.quick:
        options.steps = 3
    return options


if __name__ == "__main__":
    raise SystemExit(main())
