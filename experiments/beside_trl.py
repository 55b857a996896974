"""Training to convergence beside TRL: what is learned, what is kept, and what it costs, in both trainers.

    python -m experiments.beside_trl --pairs pairs.jsonl            # SmolLM2-135M, on the GPU if there is one
    python -m experiments.beside_trl --pairs pairs.jsonl --only 2   # two runs of those that are left, then stop
    python -m experiments.beside_trl --pairs pairs.jsonl --trl-micro-batch 2  # where four pairs do not fit TRL's memory
    python -m experiments.beside_trl --pairs pairs.jsonl --jobs 8 --no-checkpoints  # on a GPU with room for 8 runs
    python -m experiments.beside_trl --model DIR --pairs pairs.jsonl
    python -m experiments.beside_trl --random-llama --max-steps 50  # a 1B-class Llama with random weights: speed only
    python -m experiments.beside_trl --quick                        # a tiny random model; seconds

Both trainers get the same pairs in the same order (the same seed draws the same permutation), none of them truncated,
the same precomputed reference, optimizer and precision. Of each loss the learning rate is the best of four on pairs
that are taken from the training side; TRL's DPO takes that of ours, and DPO and LSIF are trained at other rates, too.
Held-out pairs are scored by one function for all, in fp32, outside of what is timed. Each run is a process of its own;
a stopped one goes on from its last checkpoint, and one that is finished is not repeated: what was seen in it is in a
record beside the tables, so that a clone of the repository goes on where this one stopped. What a step costs is
measured at the end, in a few steps of each trainer and loss: nothing else should run then. Where TRL takes a part of a
step's pairs at a time it is timed with all of them at once, too. Tables and figures are written anew after every run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.beside_trl_report import write_report
from experiments.tables import RESULTS, describe_options, write_record


@dataclass(frozen=True)
class Arm:
    """A trainer with a loss."""

    trainer: str  # "dil" or "trl"
    name: str  # of the loss
    options: Mapping[str, Any] = field(hash=False)  # of the trainer's config
    at_once: bool = False  # all pairs of a step, whatever --trl-micro-batch says

    def __str__(self) -> str:
        return f"{self.trainer} {self.name}"

    def pairs_at_a_time(self, options: argparse.Namespace) -> int:
        """Of a step: all of them, but where they are padded and the command line says otherwise."""
        padded = self.trainer == "trl" or not self.options.get("prefix_sharing", True)
        part = options.trl_micro_batch if padded and not self.at_once else None
        return int(part or options.batch_size)


DPO, TRL, LSIF, BCE, HALF, UKL = (
    Arm("dil", "dpo", {"loss_type": "dpo", "beta": 0.1, "average_log_prob": False}),
    Arm("trl", "dpo", {"loss_type": "sigmoid", "beta": 0.1}),
    Arm("dil", "lsif", {"loss_type": "lsif"}),
    Arm("dil", "bce", {"loss_type": "bce"}),
    Arm("dil", "bce, alpha 1/2", {"loss_type": "bce", "alpha": 0.5}),
    Arm("dil", "ukl", {"loss_type": "ukl"}),
)
# DPO as TRL takes its batches, which only rounds otherwise; and, timed only, TRL's with all pairs of a step at once.
PADDED = Arm("dil", "dpo, padded", {**DPO.options, "prefix_sharing": False})
AT_ONCE = Arm("trl", "dpo, at once", TRL.options, at_once=True)
TIMED_ROUNDS = 3
LEARNING_RATES = (3e-6, 1e-5, 3e-5, 1e-4)
Order = Sequence[tuple[Sequence[Arm], int, float | None]]
# Losses, a seed, and a learning rate instead of the chosen one, by what would be missed most. DPO is the same in both
# trainers: TRL's, which takes much longer on a CPU, has its other seeds late. In the last run only rounding is another.
ORDER: Order = (
    ((DPO, LSIF, TRL), 0, None),
    ((LSIF, DPO), 0, 1e-5),
    ((DPO, LSIF), 1, None),
    ((BCE, HALF), 0, None),
    ((LSIF,), 0, 3e-5),
    ((DPO,), 0, 3e-6),
    ((DPO, LSIF), 2, None),
    ((UKL,), 0, None),
    ((BCE, HALF, UKL), 1, None),
    ((TRL,), 1, None),
    ((TRL,), 2, None),
    ((PADDED,), 2, None),
)
QUICK_ORDER: Order = (((DPO, LSIF, TRL), 0, None), ((LSIF,), 0, 3e-4))


@dataclass(frozen=True)
class Run:
    """One of the experiment.

    Attributes:
        kind: "start" looks at the untrained model, "tuning" trains on a third of an epoch and sees no held-out pair,
            "timing" takes a few steps and evaluates nothing, "run" is the experiment itself.
    """

    kind: str
    arm: Arm | None = None
    seed: int = 0
    learning_rate: float | None = None  # if not the chosen one

    @property
    def name(self) -> str:
        """For people."""
        parts = [self.kind, self.arm, None if self.learning_rate is None else f"lr {self.learning_rate:g}"]
        return " ".join(str(part) for part in (*parts, f"seed {self.seed}") if part is not None)

    @property
    def label(self) -> str:
        """The arm in tables, with the learning rate if the run was made at another than the chosen one."""
        given = self.kind == "run" and self.learning_rate is not None
        return f"{self.arm}, {self.learning_rate:g}" if given else str(self.arm)

    def folder(self, options: argparse.Namespace) -> Path:
        """For its checkpoints, while it is not finished."""
        return Path(options.runs_dir, self.name.replace(",", "").replace("/", "-").replace(" ", "_"))

    def path(self, options: argparse.Namespace, suffix: str) -> Path:
        """A file beside the folder."""
        folder = self.folder(options)
        return folder.with_name(f"{folder.name}{suffix}")  # a learning rate may have a dot

    def record_path(self, options: argparse.Namespace) -> Path:
        """For what was seen in it, once it is finished."""
        return Path(options.output, "records", self.path(options, ".json").name)


def all_runs(options: argparse.Namespace) -> Iterator[Run]:
    """In the order in which they are made."""
    if options.random_llama:
        yield from (Run("run", arm) for arm in (LSIF, DPO, TRL))
        return
    yield Run("start")
    order = QUICK_ORDER if options.quick else ORDER
    for arms, seed, rate in order:
        if rate is not None and options.learning_rate is not None and not options.quick:
            continue
        for arm in arms:
            if options.learning_rate is None and rate is None and seed == 0 and arm is not TRL:
                yield from tuning_runs(arm)
            yield Run("run", arm, seed, rate)
    timed = [*dict.fromkeys((*(arm for arms, *_ in order for arm in arms), PADDED))]
    if options.trl_micro_batch not in (None, options.batch_size):
        timed.append(AT_ONCE)
    yield from (Run("timing", arm, turn) for turn in range(1 if options.quick else TIMED_ROUNDS) for arm in timed)


def tuning_runs(arm: Arm) -> list[Run]:
    """Those that choose a learning rate."""
    return [Run("tuning", arm, 0, rate) for rate in LEARNING_RATES]


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are left, in turn; write tables and figures."""
    given = sys.argv[1:] if argv is None else list(argv)
    options = parse_options(given)
    if options.run is not None:
        (run,) = (run for run in all_runs(options) if run.name == options.run)
        make_and_keep(run, options)
        return 0
    options.runs_dir.mkdir(parents=True, exist_ok=True)
    left = [run for run in all_runs(options) if not run.record_path(options).is_file()]
    check_finished(options)
    failed: list[str] = []
    for jobs, runs in stages(left[: options.only], options.jobs):
        print(f"{len(runs)} of {len(left)} runs", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            outcomes = pool.map(lambda run: make_in_a_process(run, options, given), runs)
            failed += [run.name for run, done in zip(runs, outcomes, strict=True) if not done]
        report(options)
    if not left:
        report(options)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def stages(runs: Sequence[Run], jobs: int) -> list[tuple[int, list[Run]]]:
    """Groups of runs, each with how many of it go on at a time.

    A run comes after those that it needs, and what steps cost is measured alone.
    """
    if jobs == 1:
        return [(1, [run]) for run in runs]
    tuned, trained, timed = (
        [run for run in runs if run.kind in kinds] for kinds in (("start", "tuning"), ("run",), ("timing",))
    )
    return [*((jobs, some) for some in (tuned, trained) if some), *((1, [run]) for run in timed)]


def make_in_a_process(run: Run, options: argparse.Namespace, given: Sequence[str]) -> bool:
    """Whether it went well."""
    as_chosen = replace(run, learning_rate=None)
    try:
        if run.kind == "run" and run != as_chosen and run.learning_rate == rate_of(as_chosen, options):
            print(f"{run.name} is {as_chosen.name}, as its rate is the chosen one", flush=True)
            return True
    except FileNotFoundError as error:
        print(f"{run.name} needs a run that failed ({error.filename})", file=sys.stderr)
        return False
    print(run.name, flush=True)
    command = [sys.executable, "-m", "experiments.beside_trl", *given, "--run", run.name]
    return subprocess.run(command).returncode == 0


def make_and_keep(run: Run, options: argparse.Namespace) -> None:
    """Make a run in this process."""
    from experiments.beside_trl_runs import make

    record = make(run, rate_of(run, options), options)
    for weights in run.folder(options).glob("checkpoint-*/model.safetensors"):
        weights.replace(run.path(options, ".safetensors"))
    write_record(run.record_path(options), record)
    shutil.rmtree(run.folder(options), ignore_errors=True)
    run.path(options, ".part").unlink(missing_ok=True)


def check_finished(options: argparse.Namespace) -> None:
    """Go on with runs that were made with the same options only."""
    ours = describe_options(options)
    for run in all_runs(options):
        record = read(options, run) if run.record_path(options).is_file() else {}
        theirs, now = record.get("options", ours), ours
        if record and run.kind == "timing":
            theirs = {**theirs, "pairs at a time": record["pairs_at_a_time"]}
            now = {**ours, "pairs at a time": run.arm.pairs_at_a_time(options)}
        other = [name for name in now.keys() | theirs.keys() if now.get(name) != theirs.get(name)]
        if other:
            words = ", ".join(f"{name} {theirs.get(name)}, now {now.get(name)}" for name in sorted(other))
            raise SystemExit(f"{options.output} holds a run with other options ({words}): give another --output")


def report(options: argparse.Namespace) -> None:
    """Of the runs that are finished."""
    finished = [run for run in all_runs(options) if run.record_path(options).is_file()]
    records = [
        {**read(options, run), "kind": run.kind, "arm": run.label, "of": str(run.arm), "seed": run.seed}
        for run in finished
    ]
    if any(record["kind"] == "run" for record in records):
        write_report(records, options.output)


def rate_of(run: Run, options: argparse.Namespace) -> float:
    """The learning rate: given, or that of the tuning run with the largest margin on the validation pairs.

    (Of few pairs how many are won says less.) TRL's DPO takes that of ours.
    """
    if run.learning_rate is not None or options.learning_rate is not None:
        return float(run.learning_rate or options.learning_rate)
    if run.kind == "start":
        return 0.0
    arm = DPO if run.arm in (TRL, PADDED, AT_ONCE) else run.arm
    assert arm is not None
    tried = tuning_runs(arm)
    margins = {float(each.learning_rate or 0.0): read(options, each)["validation"]["margin"] for each in tried}
    return max(margins, key=margins.__getitem__)


def read(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """The record of a finished run."""
    record: dict[str, Any] = json.loads(run.record_path(options).read_text())
    return record


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.beside_trl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a tiny random model on made-up pairs, one seed")
    parser.add_argument("--random-llama", action="store_true", help="Llama-3.2-1B's shape with random weights")
    parser.add_argument("--model", type=Path, help="a model directory (default: SmolLM2-135M, prepared under runs/)")
    parser.add_argument("--pairs", type=Path, help="preference pairs (default: the embedded ones)")
    parser.add_argument("--max-length", type=int, default=1024, help="longer pairs are left out (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step (default: %(default)s)")
    parser.add_argument("--trl-micro-batch", type=int, help="pairs that are padded at a time (default: all of a step)")
    parser.add_argument("--learning-rate", type=float, help="of every loss (default: chosen for each)")
    parser.add_argument("--epochs", type=int, default=3, help="over the training pairs (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, help="optimizer steps (default: those of the epochs)")
    parser.add_argument("--eval-steps", type=int, default=20, help="steps between evaluations (default: %(default)s)")
    parser.add_argument(
        "--answers", type=int, default=4, help="sampled a held-out prompt, for the KL (%(default)s; 0: none)"
    )
    parser.add_argument("--answer-tokens", type=int, default=128, help="of an answer at most (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], default="bf16", help="of training (%(default)s: mixed)"
    )
    parser.add_argument("--only", type=int, help="make at most so many runs")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/beside_trl"), help="of checkpoints and weights")
    parser.add_argument("--output", type=Path, default=RESULTS / "beside_trl", help="of records, tables and figures")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, on a GPU; what steps cost is measured alone (%(default)s)"
    )
    parser.add_argument("--no-checkpoints", action="store_true", help="runs that are stopped begin again")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    part = options.trl_micro_batch
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} is less than 1")
    if part is not None and (part < 1 or options.batch_size % part):
        parser.error(f"--trl-micro-batch {part} does not divide the {options.batch_size} pairs of a step")
    if options.random_llama and options.learning_rate is None:
        options.learning_rate = 1e-5  # only its speed is looked at
    if options.quick:
        options.max_steps, options.eval_steps, options.learning_rate = 12, 4, 1e-3
        options.answers, options.answer_tokens, options.precision = 1, 8, "fp32"
    return options


if __name__ == "__main__":
    raise SystemExit(main())
