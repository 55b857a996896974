"""The density-ratio loss of preference pairs from token log-probs, forward and forward+backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dil_kernels import reference
from dil_kernels.backends import resolve_backend, sums_are_compiled
from dil_kernels.functional import DILOutput
from dil_kernels.functional.loss import loss_of_token_logps
from dil_kernels.losses import FusedLossOptions, LossParameters
from dil_kernels.losses.options import SequenceOptions
from harness.check import rounding, worst
from harness.family import OURS, Errors, Family, Fn, Pass, Provider
from harness.peers import compile_problem, our_version

BASELINE = "plain"
IGNORE_INDEX = -100
LOSS_TYPE = "lsif"
LOGP_BYTES, LABEL_BYTES = 4, 8


@dataclass(frozen=True)
class LossCase:
    """Token log-probs [2B, T - 1] of B pairs, the second half of every sequence scored."""

    pairs: int  # B
    tokens: int  # T

    @property
    def name(self) -> str:
        """By which the case is chosen on the command line."""
        return f"{self.pairs}x{self.tokens}"

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.pairs} pairs of {self.tokens} tokens, {LOSS_TYPE}"

    @property
    def columns(self) -> dict[str, int | str]:
        """For the CSV."""
        return {"pairs": self.pairs, "tokens": self.tokens, "loss_type": LOSS_TYPE}

    @property
    def dtype(self) -> torch.dtype:
        """Of the log-probs."""
        return torch.float32

    @property
    def scored_per_sequence(self) -> int:
        """Scored tokens of each sequence."""
        return self.tokens // 2

    @property
    def rotated_bytes(self) -> int:
        """Bytes of both models' log-probs and of the labels."""
        return 2 * self.pairs * (2 * (self.tokens - 1) * LOGP_BYTES + self.tokens * LABEL_BYTES)


def _forward_bytes(case: LossCase) -> int:
    return 2 * case.pairs * (case.tokens * LABEL_BYTES + 2 * case.scored_per_sequence * LOGP_BYTES)


def _forward_backward_bytes(case: LossCase) -> int:
    return _forward_bytes(case) + 2 * case.pairs * (case.tokens - 1) * LOGP_BYTES


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; pair i is rows i and B + i."""

    token_logps: Tensor  # [2B, T - 1] fp32, a leaf that requires a gradient
    labels: Tensor  # [2B, T] int64, IGNORE_INDEX where not scored
    ref_token_logps: Tensor  # [2B, T - 1] fp32
    upstream: Tensor  # [B] fp32, a gradient for each pair's loss, for the check


def make_inputs(case: LossCase, device: torch.device) -> Inputs:
    """Log-probs of two models that differ a little, as after some training."""
    S, T = 2 * case.pairs, case.tokens
    generator = torch.Generator(device).manual_seed(0)
    token_logps = -3 * torch.rand(S, T - 1, generator=generator, device=device)
    ref_token_logps = token_logps + 0.5 * torch.randn(S, T - 1, generator=generator, device=device)
    labels = torch.randint(0, 32000, (S, T), generator=generator, device=device)
    labels[:, : T - case.scored_per_sequence] = IGNORE_INDEX
    upstream = torch.linspace(-0.7, 2.0, case.pairs, device=device)  # of no pair the mean's own, negated
    return Inputs(token_logps.requires_grad_(), labels, ref_token_logps, upstream)


def fresh(inputs: Inputs) -> Inputs:
    """Equal tensors in other memory."""
    return Inputs(
        inputs.token_logps.detach().clone().requires_grad_(),
        inputs.labels.clone(),
        inputs.ref_token_logps.clone(),
        inputs.upstream,
    )


def _call(fn: Fn, inputs: Inputs) -> DILOutput:
    return fn(inputs.token_logps, inputs.labels, inputs.ref_token_logps)


def _run_forward(fn: Fn, inputs: Inputs) -> None:
    with torch.no_grad():
        _call(fn, inputs)


def _run_forward_backward(fn: Fn, inputs: Inputs) -> None:
    torch.autograd.grad(_call(fn, inputs).loss, inputs.token_logps)


def _results_and_gradient(fn: Fn, inputs: Inputs) -> tuple[DILOutput, Tensor]:
    """The gradient of the mean plus a weighted sum of the losses."""
    result = _call(fn, inputs)
    upstreams = [torch.ones_like(result.loss), inputs.upstream.to(result.losses.dtype)]
    (grad,) = torch.autograd.grad([result.loss, result.losses], inputs.token_logps, upstreams)
    return DILOutput(*(value.detach() for value in result)), grad


def make_truth(inputs: Inputs) -> tuple[DILOutput, Tensor]:
    """The eager reference of the package in fp64."""
    in_fp64 = Inputs(
        inputs.token_logps.detach().double().requires_grad_(),
        inputs.labels,
        inputs.ref_token_logps.double(),
        inputs.upstream.double(),
    )
    return _results_and_gradient(_reference_loss, in_fp64)


def measure_errors(fn: Fn, inputs: Inputs, truth: tuple[DILOutput, Tensor]) -> Errors:
    """Of losses, log ratios, sums and lengths; of the gradient; each relative to the largest of its tensor."""
    result, grad = _results_and_gradient(fn, fresh(inputs))
    true_result, true_grad = truth
    errors = [_error(value, true) for value, true in zip(result, true_result, strict=True)]
    return {"losses": worst(*errors), "gradient": _error(grad, true_grad)}


def _error(value: Tensor, true: Tensor) -> float:
    if value.shape != true.shape:
        return float("inf")
    return worst(((value.double() - true.double()).abs().max() / true.double().abs().max()).item())


def roundings(inputs_dtype: torch.dtype, results_dtype: torch.dtype) -> Errors:
    """All in fp32."""
    return {"losses": rounding(results_dtype), "gradient": rounding(inputs_dtype)}


def plain_loss(token_logps: Tensor, labels: Tensor, ref_token_logps: Tensor) -> DILOutput:
    """As trainers write it: fp32, masked sums, averages, eq. 24 of the paper."""
    scored = labels[:, 1:] != IGNORE_INDEX
    lengths = scored.sum(-1)
    logps = (token_logps * scored).sum(-1)
    logratios = ((token_logps - ref_token_logps) * scored).sum(-1) / lengths
    chosen, rejected = logratios.chunk(2)
    losses = (2 * rejected).exp() / 2 - chosen.exp()
    counts = torch.full((2,), len(losses), dtype=torch.int32, device=losses.device)
    return DILOutput(losses.mean(), losses, *logps.chunk(2), chosen, rejected, *lengths.chunk(2), counts)


def _reference_loss(token_logps: Tensor, labels: Tensor, ref_token_logps: Tensor) -> DILOutput:
    loss, losses, logratios, logps, lengths, counts = reference.density_ratio(
        token_logps,
        labels,
        None,
        ref_token_logps,
        None,
        None,
        LossParameters(LOSS_TYPE),
        SequenceOptions(average=True, interleaved=False, mean=True, ignore_index=IGNORE_INDEX, shift=True),
    )
    return DILOutput(loss, losses, *logps.chunk(2), *logratios.chunk(2), *lengths.chunk(2), counts)


def _build_ours() -> Fn:
    options = FusedLossOptions(loss_type=LOSS_TYPE)

    def fused_loss(token_logps: Tensor, labels: Tensor, ref_token_logps: Tensor) -> DILOutput:
        return loss_of_token_logps(
            token_logps,
            labels,
            None,
            ref_token_logps,
            None,
            options,
            backend=resolve_backend("auto", token_logps.device, token_logps.dtype),
        )

    return fused_loss


def _ours_label(device: torch.device) -> str:
    compiled = sums_are_compiled(resolve_backend("auto", device, torch.float32), device)
    return f"{OURS} ({'extension' if compiled else 'eager'})"


def _build_compiled() -> Fn:
    # Without this, the ninth shape of a run would silently fall back to eager.
    torch.compiler.reset()
    return torch.compile(plain_loss, dynamic=False, fullgraph=True)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            OURS,
            "the second half of dil_kernels.fused_dil_loss, after the token log-probs",
            _build_ours,
            version=our_version,
            label=_ours_label,
        ),
        Provider(BASELINE, "eager, as trainers write it: fp32, masked sums, averages", lambda: plain_loss),
        Provider("eager", "the eager reference of dil_kernels, sums in fp64", lambda: _reference_loss),
        Provider("torch.compile", "the plain one under torch.compile", _build_compiled, problem=compile_problem),
    )
}

FORWARD = Pass(
    "forward",
    "read labels, and log-probs of scored tokens under both models",
    "losses",
    _run_forward,
    _forward_bytes,
)
FORWARD_BACKWARD = Pass(
    "forward+backward",
    "forward: read labels, and log-probs of scored tokens under both models; backward: write a gradient a token",
    "gradient",
    _run_forward_backward,
    _forward_backward_bytes,
)

LOSS = Family(
    name="loss",
    title="Density-ratio loss from token log-probs",
    error_words="forward: of losses, log ratios and sums; forward+backward: of the gradient; each relative to the "
    "largest of its tensor",
    passes=(FORWARD, FORWARD_BACKWARD),
    providers=PROVIDERS,
    baseline=BASELINE,
    baseline_words="the plain one: eager PyTorch as trainers write it, in fp32",
    # Bars first, then the curve over B.
    grids={
        "cpu": tuple(LossCase(*size) for size in ((256, 2048), (16, 2048), (1, 2048), (4, 2048), (64, 2048))),
        "cuda": tuple(
            LossCase(*size)
            for size in ((256, 2048), (16, 2048), (1, 2048), (256, 512), (4, 2048), (64, 2048), (1024, 2048))
        ),
        "quick": (LossCase(3, 17), LossCase(2, 64)),
    },
    curves={"pairs": "{tokens} tokens, {loss_type}"},
    curve_value="p50_ms",
    columns=("median ms", "p20 - p80", "host ms", "launches", "of floor", "x baseline", "max error"),
    make_inputs=make_inputs,
    fresh=fresh,
    make_truth=make_truth,
    measure_errors=measure_errors,
    yardstick=plain_loss,
    roundings=roundings,
)
