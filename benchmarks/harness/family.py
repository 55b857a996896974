"""What a benchmark consists of: cases, passes, providers, and how a result is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Fn = Callable[..., Any]  # what a provider builds; every pass of the family knows how to call it
Errors = dict[str, float]  # largest error of each kind that the family measures

OURS = "dil_kernels"
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class WrongResultError(Exception):
    """A result that is wrong in a way that no error measures; says how."""


class Case(Protocol):
    """One set of sizes."""

    @property
    def name(self) -> str:
        """By which the case is chosen on the command line; unique in a grid."""

    @property
    def title(self) -> str:
        """For people, one line."""

    @property
    def columns(self) -> dict[str, int | str]:
        """Its sizes, for the CSV and the axes of curves."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs; the GEMM ceiling is measured in it."""

    @property
    def rotated_bytes(self) -> int:
        """Bytes of those inputs that `Family.fresh` makes anew."""


@dataclass(frozen=True)
class Pass:
    """What one timed call does.

    Attributes:
        name: as it appears in tables and files.
        words: the bytes and FLOPs it counts, in words.
        error: the name of the error that this pass adds.
        run: makes one call, `run(fn, inputs)`; results are freed inside it, as a training step frees them.
        bytes_counted: bytes that no implementation can avoid in this pass over a case.
        flops_counted: likewise its FLOPs; None where matrix products play no part.
    """

    name: str
    words: str
    error: str
    run: Callable[[Fn, Any], None]
    bytes_counted: Callable[[Any], int]
    flops_counted: Callable[[Any], int] | None = None


def _always(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        name: by which it is chosen on the command line.
        description: what is called, in words.
        build: makes the function to time; called once a case, so that a compiler may specialise on it.
        problem: why it cannot run on a device, or None.
        version: of what is called, for the record.
        label: its name in tables where that depends on the device.
        rounds_results: it stores results in the dtype of the inputs, where others use fp32.
        destroys_inputs: it overwrites its inputs, so it is timed on inputs of its own.
        checked: against fp64; not what does a part of the work only, for comparison.
    """

    name: str
    description: str
    build: Callable[[], Fn]
    problem: Callable[[torch.device], str | None] = _always
    version: Callable[[], str] = lambda: f"torch {torch.__version__}"
    label: Callable[[torch.device], str] | None = None
    rounds_results: bool = False
    destroys_inputs: bool = False
    checked: bool = True

    def label_on(self, device: torch.device) -> str:
        """Its name in tables."""
        return self.name if self.label is None else self.label(device)


@dataclass(frozen=True)
class Family:
    """One benchmark.

    Attributes:
        name: of its files.
        title: what is computed from what, in words.
        error_words: what the errors are relative to, for the legend.
        passes: in the order of the tables.
        providers: ours first.
        baseline: the provider whose time the others' are compared to.
        baseline_words: how that one works, for the legend.
        grids: cases for "cpu", "cuda" and "quick"; the first ones get bar charts.
        curves: columns of a case over which curves are drawn, each with what it holds fixed, a format of columns.
        curve_value: what they show: "share_of_floor", or "p50_ms" where launches and not bytes or FLOPs take the time.
        columns: of the printed tables, by their names in `report.COLUMNS`.
        make_inputs: of a case on a device, always the same ones.
        fresh: equal inputs in other memory.
        make_truth: results in fp64.
        measure_errors: of a function, on inputs, against the truth; the inputs are left as they are.
        yardstick: eager PyTorch, whose errors in the same dtype are the measure of the others'.
        roundings: for a dtype of inputs and one of results, one rounding of each kind of result.
    """

    name: str
    title: str
    error_words: str
    passes: tuple[Pass, ...]
    providers: Mapping[str, Provider]
    baseline: str
    baseline_words: str
    grids: Mapping[str, tuple[Any, ...]]
    curves: Mapping[str, str]
    curve_value: str
    columns: tuple[str, ...]
    make_inputs: Callable[[Any, torch.device], Any]
    fresh: Callable[[Any], Any]
    make_truth: Callable[[Any], Any]
    measure_errors: Callable[[Fn, Any, Any], Errors]
    yardstick: Fn
    roundings: Callable[[torch.dtype, torch.dtype], Errors]
