"""Runs of dil-train in which something goes wrong at a moment of the run: the cells of the table in docs/faults.md."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from file_modes import make_read_only, set_rights
from forked import forking, write_into
from tiny_model import make_model, make_pairs, save_model, write_lines

MOMENTS = ("tokenising", "precomputing", "training", "checkpointing", "evaluating", "final save")
FAULTS = (
    "kill -9",
    "SIGINT",
    "disk full",
    "read-only directory",
    "damaged checkpoint",
    "damaged cache",
    "two runs in one directory",
    "clock moved back",
    "data file changed",
)
# What comes of a fault, in every case with nothing lost: the model, the losses and the evaluation are bit for bit those
# of a run without it.
OUTCOMES = {
    "goes on": "the run goes on to its end",
    "resumed": "the run ends with one line that names the last good checkpoint (killed, with none), and resumes there",
    "again": "the run ends with one line (killed, with none) before its first checkpoint, and is started again",
    "refused": "resuming is refused in one line that names the file and the checkpoint before, and resumes from that",
}
ENDED = ("again", "again", "resumed", "resumed", "resumed", "resumed")
EXPECTED = {
    (fault, moment): outcome
    for fault, outcomes in {
        **dict.fromkeys(FAULTS, ("goes on",) * len(MOMENTS)),
        **dict.fromkeys(("kill -9", "SIGINT", "disk full", "read-only directory", "damaged cache"), ENDED),
        "damaged checkpoint": ("refused", "refused", "goes on", "goes on", "goes on", "goes on"),
    }.items()
    for moment, outcome in zip(MOMENTS, outcomes, strict=True)
}

STEPS, SAVE_STEPS, EVAL_STEPS = 6, 2, 3
SMALL_FILE = 16 << 10  # which logs and states fit into, and weights do not
DAY = 86400


def table() -> str:
    """The table of the documentation."""
    rows = [["", *MOMENTS], *([fault, *(EXPECTED[fault, moment] for moment in MOMENTS)] for fault in FAULTS)]
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def make_inputs(folder: Path) -> Path:
    """A model with dropout and two files of pairs."""
    save_model(folder / "model", make_model(attention_dropout=0.3))
    for name, count, seed in (("pairs", 12, 0), ("held_out", 5, 1)):
        write_lines(folder / f"{name}.jsonl", *make_pairs(count, seed))
    return folder


def arguments(folder: Path, out: Path, **more: Any) -> list[str]:
    given = {
        "model": folder / "model",
        "train_file": folder / "pairs.jsonl",
        "eval_file": folder / "held_out.jsonl",
        "output_dir": out,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": EVAL_STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "disable_dropout": False,
        "precompute_ref_log_probs": True,
        "ref_cache_dir": folder / "caches" / "refs",
        "num_generations_at_eval": 1,
        "generate_max_new_tokens": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **more,
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


# ---- in the process of the run


class Moment:
    """Calls `fire` once, when a run reaches a moment.

    Args:
        name: of MOMENTS.
        fire: what goes wrong.
    """

    def __init__(self, name: str, fire: Callable[[], None]) -> None:
        self.fired, self._fire = False, fire
        getattr(self, name.replace(" ", "_"))()

    def _now(self) -> None:
        if not self.fired:
            self.fired = True
            self._fire()

    def _before(self, owner: Any, name: str, when: Callable[..., bool]) -> None:
        whole = getattr(owner, name)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            if when(*args, **kwargs):
                self._now()
            return whole(*args, **kwargs)

        setattr(owner, name, hooked)

    def tokenising(self) -> None:
        """In the middle of the rows, however the tokenizer is called; at the latest when all are done."""
        from transformers import PreTrainedTokenizerBase

        from dil_kernels.training import prepare

        whole, calls = prepare.tokenize_and_report, []

        def hooked(*args: Any, **kwargs: Any) -> Any:
            calls.append(0)
            result = whole(*args, **kwargs)
            self._now()
            return result

        def fifth(*args: Any, **kwargs: Any) -> bool:
            return bool(calls) and (calls.append(0) or len(calls) == 6)

        prepare.tokenize_and_report = hooked
        self._before(PreTrainedTokenizerBase, "__call__", fifth)

    def precomputing(self) -> None:
        from dil_kernels.training.batch_loss import BatchLoss

        batches: list[int] = []
        self._before(BatchLoss, "reference_token_logps", lambda *_: batches.append(0) or len(batches) == 2)

    def training(self) -> None:
        from dil_kernels.trainer import DILTrainer

        self._before(DILTrainer, "training_step", lambda self, *_, **__: self.state.global_step in (3, 5))

    def checkpointing(self) -> None:
        """Weights and optimizer are written."""
        from dil_kernels.trainer import DILTrainer

        self._before(DILTrainer, "_save_rng_state", lambda self, *_: self.state.global_step >= 4)

    def evaluating(self) -> None:
        from dil_kernels.trainer import DILTrainer

        self._before(DILTrainer, "prediction_step", lambda self, *_, **__: self.state.global_step >= EVAL_STEPS)

    def final_save(self) -> None:
        from dil_kernels.trainer import DILTrainer

        self._before(
            DILTrainer, "_save", lambda self, folder=None, *_, **__: folder in (None, str(self.args.output_dir))
        )


def fill_disk() -> None:
    """No file grows any more beyond a few KB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        middle = path.stat().st_size // 2
        file.seek(middle)
        byte = file.read(1)[0]
        file.seek(middle)
        file.write(bytes([byte ^ 64]))


def damage_last_checkpoint(out: Path) -> None:
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    flip_a_byte(last / "model.safetensors")


def damage(caches: Path) -> None:
    for path in caches.rglob("*"):
        if path.is_file() and path.stat().st_size:
            flip_a_byte(path)


def move_clock_back(out: Path) -> None:
    now = time.time()
    for path in out.glob("checkpoint-*"):
        os.utime(path, (now + DAY, now + DAY))
    whole = time.time
    time.time = lambda: whole() - DAY


def change_data(file: Path) -> None:
    write_lines(file, *make_pairs(12, seed=7))


def child(
    folder: Path,
    out: Path,
    given: list[str],
    fault: str,
    moment: str,
    log: Path,
    meeting: Any,
    environment: dict[str, str],
) -> None:
    """`dil-train` in a process of its own, which runs in the folder; its exit status is that of the program."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    write_into(log, log)
    import datasets
    import torch

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = folder / "caches" / "datasets"

    def meet() -> None:
        here, go_on = meeting
        here.set()
        assert go_on.wait(120)

    faults: dict[str, Callable[[], Any]] = {
        "kill -9": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "SIGINT": lambda: signal.raise_signal(signal.SIGINT),  # to this thread, before it goes on
        "disk full": fill_disk,
        "read-only directory": lambda: (make_read_only(out, folder / "caches"), set_rights(0)),
        "damaged checkpoint": lambda: damage_last_checkpoint(out),
        "two runs in one directory": meet,
        "clock moved back": lambda: move_clock_back(out),
        "data file changed": lambda: change_data(folder / "pairs.jsonl"),
    }
    fires = Moment(moment, faults[fault]) if fault else None
    from dil_kernels.cli import programs

    try:
        status = programs.main(given)
    except SystemExit as end:
        status = int(end.code or 0)
    if fires is not None and not fires.fired:
        print(f"the run never came to {moment}")
        status = 99
    sys.stdout.flush()
    os._exit(status)


# ---- in the process of the test


class Runner:
    """Starts runs as forks of one process that has imported everything."""

    def __init__(self, inputs: Path) -> None:
        self._inputs, self._count, self._context = inputs, 0, forking()

    def folder(self, name: str) -> Path:
        """Inputs of a cell, which it may change."""
        folder = self._inputs.parent / name.replace(" ", "_")
        shutil.copytree(self._inputs, folder)
        (folder / "caches").mkdir()
        return folder

    @contextlib.contextmanager
    def start(
        self,
        folder: Path,
        out: Path,
        fault: str = "",
        moment: str = "",
        environment: dict[str, str] | None = None,
        **more: Any,
    ) -> Iterator[Any]:
        """A run, which is waited for; its status is that of the program, or minus a signal's number."""
        self._count += 1
        meeting = self._context.Event(), self._context.Event()
        log = folder / f"log{self._count}.txt"
        given = arguments(folder, out, **more)
        details = (folder, out, given, fault, moment, log, meeting, {**os.environ, **(environment or {})})
        process = self._context.Process(target=child, args=details)
        process.start()
        run = Run(process, log, meeting)
        try:
            yield run
        finally:
            meeting[1].set()
            process.join(240)
            if process.is_alive():
                process.kill()
                process.join()

    def run(self, *args: Any, **kwargs: Any) -> Run:
        with self.start(*args, **kwargs) as run:
            pass
        return run


class Run:
    """A run that was started.

    Attributes:
        meeting: two events: it has come to the moment; it may go on.
    """

    def __init__(self, process: Any, log: Path, meeting: Any) -> None:
        self._process, self._log, self.meeting = process, log, meeting

    @property
    def status(self) -> int:
        return self._process.exitcode

    @property
    def said(self) -> str:
        """All that it printed."""
        return self._log.read_text()

    @property
    def error(self) -> str:
        """The line in which it said why it ended; the only one of this kind."""
        (line,) = [line for line in self.said.splitlines() if line.startswith("dil-train: error: ")]
        assert "Traceback" not in self.said, self.said
        return line.removeprefix("dil-train: error: ")


def result(out: Path) -> dict[str, Any]:
    """What a run has made: weights and generations bit for bit, the losses of every step, the table."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    names = ("step", "loss", "grad_norm", "eval_loss", "eval_rewards/margins", "rewards/margins")
    return {
        "weights": (out / "model.safetensors").read_bytes(),
        "generations": (out / "generations.jsonl").read_text(),
        "table": (out / "before_after.json").read_text(),
        "log": [{name: log[name] for name in names if name in log} for log in history if "train_loss" not in log],
        "card": (out / "README.md").is_file(),
        "checkpoints": sorted(path.name for path in out.glob("checkpoint-*")),
    }
