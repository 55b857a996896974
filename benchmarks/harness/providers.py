"""Who is timed: every implementation of per-sequence log-probs from logits, each called in the way that costs it least.

A provider that needs next-token labels gets them by shifting the labels, never by copying the logits, unless copying is
what its users do.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dil_kernels
from dil_kernels import reference
from dil_kernels.backends import resolve_backend
from harness.cases import IGNORE_INDEX
from harness.machine import installed_version

SequenceLogps = Callable[[Tensor, Tensor], Tensor]  # (logits [B, T, V], labels [B, T]) -> summed log-probs [B]

OURS = "dil_kernels"
BASELINE = "authors"


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
        logps_in_logits_dtype: it stores token log-probs in the dtype of the logits, where others use fp32.
        destroys_logits: its forward or backward overwrites the logits, so it is timed on buffers of its own.
    """

    name: str
    description: str
    build: Callable[[], SequenceLogps]
    problem: Callable[[torch.device], str | None] = _always
    version: Callable[[], str] = lambda: f"torch {torch.__version__}"
    logps_in_logits_dtype: bool = False
    destroys_logits: bool = False


def _build_ours() -> SequenceLogps:
    return dil_kernels.sequence_logps


def authors_sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """The common recipe: shift both by slicing, fp32 log_softmax over the whole slice, gather, mask, sum."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != IGNORE_INDEX
    token_logps = logits.float().log_softmax(-1).gather(-1, labels.masked_fill(~scored, 0).unsqueeze(-1)).squeeze(-1)
    return (token_logps * scored).sum(-1)


def eager_sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """The eager reference of the package, which is also the oracle when given fp64."""
    return reference.token_logps(logits, labels, ignore_index=IGNORE_INDEX).sum(-1)


def _build_compiled() -> SequenceLogps:
    # Without this, the ninth shape of a run would silently fall back to eager.
    torch.compiler.reset()
    return torch.compile(authors_sequence_logps, dynamic=False, fullgraph=True)


def _compile_problem(device: torch.device) -> str | None:
    if device.type == "cpu" and not any(
        shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")
    ):
        return "needs a C++ compiler (g++ or clang++, or CXX)"
    return None


def next_token_labels(labels: Tensor) -> Tensor:  # [B, T] -> [B, T]
    """Row t gets label t + 1 and the last row is ignored, so that the logits need no slice."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)


def _build_trl() -> SequenceLogps:
    from trl.kernels import selective_log_softmax_and_entropy

    def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
        labels = next_token_labels(labels)
        scored = labels != IGNORE_INDEX
        token_logps, _ = selective_log_softmax_and_entropy(logits, labels.masked_fill(~scored, 0), row_mask=scored)
        return token_logps.sum(-1)

    return sequence_logps


def _build_liger() -> SequenceLogps:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
        losses = liger_cross_entropy(
            logits.flatten(0, 1), next_token_labels(labels).flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        return -losses.view(labels.shape).sum(-1, dtype=torch.float32)

    return sequence_logps


def _peer_version(distribution: str) -> Callable[[], str]:
    return lambda: f"{distribution} {installed_version(distribution)}"


def _peer_problem(distribution: str, module: str) -> Callable[[torch.device], str | None]:
    """For a package that may not be there and whose kernels run on CUDA alone."""

    def problem(device: torch.device) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"not installed (pip install {distribution})"
        if device.type != "cuda":
            return f"needs CUDA ({_peer_version(distribution)()} is installed)"
        return None

    return problem


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            OURS,
            "dil_kernels.sequence_logps, backend auto",
            _build_ours,
            version=lambda: f"dil_kernels {dil_kernels.__version__}",
        ),
        Provider(
            BASELINE,
            "the authors' way: slice, fp32 log_softmax over every row, gather, mask, sum",
            lambda: authors_sequence_logps,
        ),
        Provider("eager", "the eager reference of dil_kernels", lambda: eager_sequence_logps),
        Provider("torch.compile", "the authors' way under torch.compile", _build_compiled, problem=_compile_problem),
        Provider(
            "trl",
            "trl.kernels.selective_log_softmax_and_entropy",
            _build_trl,
            problem=_peer_problem("trl", "trl"),
            version=_peer_version("trl"),
        ),
        Provider(
            "liger",
            "liger_cross_entropy, reduction none; gradients overwrite the logits",
            _build_liger,
            problem=_peer_problem("liger-kernel", "liger_kernel"),
            version=_peer_version("liger-kernel"),
            logps_in_logits_dtype=True,
            destroys_logits=True,
        ),
    )
}


def describe(provider: Provider, device: torch.device, dtype: torch.dtype) -> str:
    """The label of a provider in tables; ours says which backend `auto` took."""
    if provider.name == OURS:
        return f"{OURS} ({resolve_backend('auto', device, dtype)})"
    return provider.name
