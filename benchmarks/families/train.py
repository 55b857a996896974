"""One optimizer step of preference training (DPO): forward of policy and reference, backward, AdamW."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from families.train_inputs import BETA, Inputs, TrainCase, make_inputs, sum_logps
from families.train_providers import BASELINE, PROVIDERS, Step, authors_step
from harness.check import rounding, worst
from harness.family import Errors, Family, Pass

FP32, BF16 = torch.float32, torch.bfloat16
TYPICAL_NATS = 1e3  # of a response's log-prob

# AdamW reads and writes the weight and two moments, and reads the gradient.
OPTIMIZER_ACCESSES = 7


def _flops(case: TrainCase) -> int:
    """Of the matrix products: body over every token, head over scored ones, attention below the diagonal."""
    sizes = case.config_sizes
    tokens, scored = (int(case.columns[name]) for name in ("tokens", "scored_tokens"))
    lengths = [len(prompt) + len(response) for prompt, response in case.sequences]
    body, head = 2 * sizes["body"] * tokens, 2 * sizes["head"] * scored
    attention = 2 * sizes["attention"] * sum(length * (length + 1) for length in lengths)
    forwards = 4 if case.reference == "model" else 3  # a backward is twice a forward
    return forwards * (body + head + attention)


def _bytes(case: TrainCase) -> int:
    """Weights read forward and backward, gradients written, AdamW; the reference's weights read."""
    accesses = 3 + OPTIMIZER_ACCESSES + (1 if case.reference == "model" else 0)
    return accesses * case.config_sizes["parameters"] * case.dtype.itemsize


def fresh(inputs: Inputs) -> Inputs:
    """The same: a step reads all weights, which are larger than a cache in every case that is timed in earnest."""
    return inputs


def _run_step(fn: Step, inputs: Inputs) -> None:
    fn(inputs)
    inputs.optimizer.step()
    inputs.optimizer.zero_grad()


@dataclass(frozen=True)
class Truth:
    """Results in fp64.

    In bf16 the layers of the model round so much that a wrong gradient may pass for a right one: there a step on the
    first pairs is checked in fp32, too.
    """

    loss: Tensor  # []
    gradients: dict[str, Tensor]  # of `Inputs.probed`
    in_fp32: tuple[Inputs, Truth] | None = None


def make_truth(inputs: Inputs) -> Truth:
    """Policy and reference in fp64, every sequence alone, the loss by its formula."""
    in_fp32 = None
    if inputs.case.dtype.itemsize < FP32.itemsize:
        first_pairs = replace(inputs.case, dtype=FP32, pairs=min(inputs.case.pairs, 2))
        other = make_inputs(first_pairs, inputs.device)
        other.optimizer.state.clear()  # no step is taken, and the moments are large
        in_fp32 = other, make_truth(other)
    sequences, device = inputs.case.sequences, inputs.device

    def sums_of(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.stack([sum_logps(model, *sequence, device) for sequence in sequences])

    if inputs.case.reference == "model":
        ref_logps = sums_of(copy.deepcopy(inputs.reference).double())
    else:
        columns = ("ref_chosen_logps", "ref_rejected_logps")
        ref_logps = torch.tensor([e[c] for c in columns for e in inputs.examples], device=device, dtype=torch.float64)
    policy = copy.deepcopy(inputs.model).double()
    logps = sums_of(policy).requires_grad_()
    chosen, rejected = (logps - ref_logps).chunk(2)
    loss = -logsigmoid(BETA * (chosen - rejected)).mean()
    (upstream,) = torch.autograd.grad(loss, logps)
    names = list(inputs.probed)
    probed = [dict(policy.named_parameters())[name] for name in names]
    gradients = [torch.zeros_like(parameter) for parameter in probed]
    for sequence, coefficient in zip(sequences, upstream, strict=True):
        parts = torch.autograd.grad(coefficient * sum_logps(policy, *sequence, device), probed)
        torch._foreach_add_(gradients, list(parts))
    return Truth(loss.detach(), dict(zip(names, gradients, strict=True)), in_fp32)


def measure_errors(fn: Step, inputs: Inputs, truth: Truth) -> Errors:
    """Of the loss, in nats; of a parameter's gradient, by norms; of both in fp32, where the case is in less."""
    inputs.optimizer.zero_grad()  # another may have failed half-way
    loss = fn(inputs).double()
    errors = []
    for name, parameter in inputs.probed.items():
        if parameter.grad is None:
            errors.append(float("inf"))
            continue
        difference = parameter.grad.double() - truth.gradients[name]
        errors.append((difference.norm() / truth.gradients[name].norm()).item())
    inputs.optimizer.zero_grad()
    found = {"loss": (loss - truth.loss).abs().item(), "gradient": worst(*errors)}
    if truth.in_fp32 is not None:
        found |= {f"{kind} in fp32": error for kind, error in measure_errors(fn, *truth.in_fp32).items()}
    return found


def roundings(inputs_dtype: torch.dtype, results_dtype: torch.dtype) -> Errors:
    """The loss is one of sums of log-probs, which are results; gradients have the dtype of the weights."""
    loss = BETA * TYPICAL_NATS * rounding(results_dtype)
    in_fp32 = {"loss in fp32": BETA * TYPICAL_NATS * rounding(FP32), "gradient in fp32": rounding(FP32)}
    return {"loss": loss, "gradient": rounding(inputs_dtype), **in_fp32}


CPU_GRID = (
    TrainCase("smollm2-135m", "real", 4, 256, "model", FP32),
    TrainCase("smollm2-135m", "real", 4, 256, "precomputed", FP32),
    TrainCase("smollm2-135m", "equal", 1, 256, "model", FP32),
    TrainCase("smollm2-135m", "real", 4, 512, "model", FP32),
    TrainCase("smollm2-135m", "real", 2, 2048, "model", FP32),
    TrainCase("smollm2-135m", "real", 4, 512, "model", BF16),
    TrainCase("smollm2-135m", "summary", 4, 390, "model", FP32),
    TrainCase("smollm2-135m", "prompt-17", 16, 34, "model", FP32),
)
CUDA_GRID = (
    TrainCase("llama-1b", "equal", 1, 2048, "model", BF16),
    TrainCase("llama-1b", "equal", 1, 2048, "precomputed", BF16),
    TrainCase("llama-1b", "ragged", 4, 2048, "model", BF16),
    TrainCase("llama-1b", "ragged", 4, 2048, "precomputed", BF16),
    TrainCase("llama-1b", "prompt-512", 8, 512 + 256, "model", BF16),
    TrainCase("llama-1b", "prompt-2048", 4, 2048 + 128, "model", BF16),
)
QUICK_GRID = (
    TrainCase("tiny", "ragged", 3, 24, "model", FP32),
    TrainCase("tiny", "ragged", 3, 24, "precomputed", FP32),
    TrainCase("tiny", "equal", 1, 16, "model", FP32),
)

STEP = Pass(
    "step",
    "all matrix products, each token and each scored row once: forward and backward of the policy, forward of the "
    "reference; weights, gradients and AdamW's moments read and written",
    "gradient",
    _run_step,
    _bytes,
    _flops,
)

TRAIN = Family(
    name="train",
    title="One training step on preference pairs (DPO on summed log-probs): forward, backward, AdamW",
    error_words="of a parameter's gradient, by its norm; the loss is checked, too",
    passes=(STEP,),
    providers=PROVIDERS,
    baseline=BASELINE,
    baseline_words="one forward of all sequences, padded; fp32 log_softmax of all logits",
    grids={"cpu": CPU_GRID, "cuda": CUDA_GRID, "quick": QUICK_GRID},
    curves={},
    curve_value="p50_ms",
    columns=("median ms", "p20 - p80", "tokens/s", "of floor", "x baseline", "max error", "peak MB"),
    make_inputs=make_inputs,
    fresh=fresh,
    make_truth=make_truth,
    measure_errors=measure_errors,
    yardstick=authors_step,
    roundings=roundings,
)
