"""Every implementation of per-sequence log-probs from logits, each called in the way that costs it least.

A provider that needs next-token labels gets them by shifting the labels, never by copying the logits, unless copying is
what its users do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dil_kernels
from dil_kernels import reference
from dil_kernels.backends import resolve_backend
from dil_kernels.options import ScoringOptions
from harness.family import OURS, Provider
from harness.peers import compile_problem, our_label, our_version, peer_problem, peer_version

SequenceLogps = Callable[[Tensor, Tensor], Tensor]  # (logits [B, T, V], labels [B, T]) -> summed log-probs [B]

BASELINE = "authors"
IGNORE_INDEX = -100


class _HeadOutput(torch.autograd.Function):
    """Logits as a model's head returns them: in the same memory, but neither a leaf nor a view of one."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        """A tensor of its own over the storage of the logits."""
        alias = logits.new_empty(0)
        return alias.set_(logits.untyped_storage(), logits.storage_offset(), logits.shape, logits.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The gradient as it is."""
        return grad


def _build_ours_in_place() -> SequenceLogps:
    return lambda logits, labels: dil_kernels.sequence_logps(_HeadOutput.apply(logits), labels, inplace_backward=True)


def authors_sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """The common recipe: shift both by slicing, fp32 log_softmax over the whole slice, gather, mask, sum."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != IGNORE_INDEX
    token_logps = logits.float().log_softmax(-1).gather(-1, labels.masked_fill(~scored, 0).unsqueeze(-1)).squeeze(-1)
    return (token_logps * scored).sum(-1)


def eager_sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """The eager reference of the package, which is also the oracle when given fp64."""
    return reference.token_logps(logits, labels, ScoringOptions(ignore_index=IGNORE_INDEX)).sum(-1)


def _build_compiled() -> SequenceLogps:
    # Without this, the ninth shape of a run would silently fall back to eager.
    torch.compiler.reset()
    return torch.compile(authors_sequence_logps, dynamic=False, fullgraph=True)


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


def _build_trl_eager() -> SequenceLogps:
    from trl.trainer.utils import selective_log_softmax

    def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
        labels = next_token_labels(labels)
        scored = labels != IGNORE_INDEX
        token_logps = selective_log_softmax(logits, labels.masked_fill(~scored, 0), row_mask=scored)
        return token_logps.sum(-1, dtype=torch.float32)

    return sequence_logps


def _of_cross_entropy(cross_entropy: Callable[[Tensor, Tensor], Tensor]) -> SequenceLogps:
    """Sums of the negative losses of `cross_entropy(logits [B * T, V], labels [B * T]) -> losses [B * T]`."""

    def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
        losses = cross_entropy(logits.flatten(0, 1), next_token_labels(labels).flatten())
        return -losses.view(labels.shape).sum(-1, dtype=torch.float32)

    return sequence_logps


def _build_liger() -> SequenceLogps:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return _of_cross_entropy(functools.partial(liger_cross_entropy, ignore_index=IGNORE_INDEX, reduction="none"))


def _build_liger_cute() -> SequenceLogps:
    from liger_kernel.functional import cross_entropy

    options = {"ignore_index": IGNORE_INDEX, "reduction": "none", "impl": "nvidia-cutedsl"}
    return _of_cross_entropy(lambda logits, labels: cross_entropy(logits, labels, **options)[0])


def _build_quack(inplace: bool) -> SequenceLogps:
    from quack import cross_entropy

    return _of_cross_entropy(
        functools.partial(cross_entropy, ignore_index=IGNORE_INDEX, reduction="none", inplace_backward=inplace)
    )


def _build_flash_attention(inplace: bool) -> SequenceLogps:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        losses, _ = cross_entropy_loss(logits, labels, ignore_index=IGNORE_INDEX, inplace_backward=inplace)
        return losses

    return _of_cross_entropy(cross_entropy)


def _in_place_problem(device: torch.device) -> str | None:
    if resolve_backend("auto", device, torch.float32) == "eager":
        return "no fused backend runs here, and the eager one cannot write in place"
    return None


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            OURS,
            "dil_kernels.sequence_logps, backend auto",
            lambda: dil_kernels.sequence_logps,
            version=our_version,
            label=our_label,
        ),
        Provider(
            f"{OURS}-inplace",
            "dil_kernels.sequence_logps, inplace_backward=True",
            _build_ours_in_place,
            problem=_in_place_problem,
            version=our_version,
            destroys_inputs=True,
        ),
        Provider(
            BASELINE,
            "the authors' way: slice, fp32 log_softmax over every row, gather, mask, sum",
            lambda: authors_sequence_logps,
        ),
        Provider("eager", "the eager reference of dil_kernels", lambda: eager_sequence_logps),
        Provider("torch.compile", "the authors' way under torch.compile", _build_compiled, problem=compile_problem),
        Provider(
            "trl",
            "trl.kernels.selective_log_softmax_and_entropy",
            _build_trl,
            problem=peer_problem("trl", "trl"),
            version=peer_version("trl"),
        ),
        Provider(
            "trl-eager",
            "trl.trainer.utils.selective_log_softmax, which on CUDA calls the kernel that `trl` times",
            _build_trl_eager,
            problem=peer_problem("trl", "trl", "cpu"),
            version=peer_version("trl"),
            rounds_results=True,
        ),
        Provider(
            "liger",
            "liger_kernel liger_cross_entropy, reduction none; gradients overwrite the logits",
            _build_liger,
            problem=peer_problem("liger-kernel", "liger_kernel"),
            version=peer_version("liger-kernel"),
            rounds_results=True,
            destroys_inputs=True,
        ),
        Provider(
            "liger-cute",
            "liger_kernel.functional.cross_entropy, impl nvidia-cutedsl, reduction none",
            _build_liger_cute,
            problem=peer_problem("nvidia-cutlass-dsl", "cutlass"),
            version=peer_version("liger-kernel"),
            rounds_results=True,
            destroys_inputs=True,
        ),
        *(
            Provider(
                f"quack{suffix}",
                f"quack.cross_entropy, reduction none, inplace_backward={inplace}",
                functools.partial(_build_quack, inplace),
                problem=peer_problem("quack-kernels", "quack"),
                version=peer_version("quack-kernels"),
                destroys_inputs=inplace,
            )
            for suffix, inplace in (("", False), ("-inplace", True))
        ),
        *(
            Provider(
                f"flash-attn{suffix}",
                f"flash_attn.ops.triton.cross_entropy.cross_entropy_loss, inplace_backward={inplace}",
                functools.partial(_build_flash_attention, inplace),
                problem=peer_problem("flash-attn", "flash_attn"),
                version=peer_version("flash-attn"),
                destroys_inputs=inplace,
            )
            for suffix, inplace in (("", False), ("-inplace", True))
        ),
    )
}
