"""A preference loss from hidden states and the head, forward and forward+backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dil_kernels import reference
from dil_kernels.options import ScoringOptions
from families.linear_inputs import BETA, IGNORE_INDEX, Inputs, LossFromHidden, Task
from families.linear_providers import BASELINE, PROVIDERS, eager_loss
from harness.check import rounding, worst
from harness.family import DTYPE_NAMES, Errors, Family, Pass

ROWS_PER_CHUNK = 256  # of fp64 logits that the check holds at a time
LOGIT_STD = 2.0
TYPICAL_NATS = 1e3  # of a response's log-prob


@dataclass(frozen=True)
class LinearCase:
    """One task on one batch of hidden states [2B, T, D] with the same share of every sequence scored.

    Attributes:
        task: what is computed; see `linear_inputs.Task`.
        sequences: 2B.
        tokens: T, tokens of each sequence.
        hidden_size: D.
        vocab: V.
        dtype: of hidden states and weights.
        scored_percent: share of the 2B * T positions that are scored. The last one of a sequence predicts nothing, so
            100 means T - 1 of each sequence.
    """

    task: Task
    sequences: int
    tokens: int
    hidden_size: int
    vocab: int
    dtype: torch.dtype
    scored_percent: int

    @property
    def name(self) -> str:
        """By which the case is chosen on the command line."""
        sizes = f"{self.sequences}x{self.tokens}-d{self.hidden_size}-v{self.vocab}"
        return f"{self.task}-{sizes}-{DTYPE_NAMES[self.dtype]}-{self.scored_percent}pct"

    @property
    def title(self) -> str:
        """For people."""
        return (
            f"{self.task}: {self.rows} rows, D={self.hidden_size}, V={self.vocab}, {DTYPE_NAMES[self.dtype]}, "
            f"{self.scored_percent}% scored"
        )

    @property
    def columns(self) -> dict[str, int | str]:
        """For the CSV."""
        return {
            "task": self.task,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "hidden_size": self.hidden_size,
            "vocab": self.vocab,
            "dtype": DTYPE_NAMES[self.dtype],
            "scored_percent": self.scored_percent,
            "rows": self.rows,
            "scored_rows": self.scored_rows,
        }

    @property
    def rows(self) -> int:
        """2B * T."""
        return self.sequences * self.tokens

    @property
    def scored_per_sequence(self) -> int:
        """Scored positions of each sequence."""
        return min(round(self.tokens * self.scored_percent / 100), self.tokens - 1)

    @property
    def scored_rows(self) -> int:
        """Scored positions of the batch."""
        return self.sequences * self.scored_per_sequence

    @property
    def weight_bytes(self) -> int:
        """Bytes of one head."""
        return self.vocab * self.hidden_size * self.dtype.itemsize

    @property
    def rotated_bytes(self) -> int:
        """Bytes of the policy's hidden states and weight."""
        return self.weight_bytes + self.rows * self.hidden_size * self.dtype.itemsize

    @property
    def product_flops(self) -> int:
        """FLOPs of one product of the scored rows with the weight."""
        return 2 * self.scored_rows * self.hidden_size * self.vocab


def _forward_flops(case: LinearCase) -> int:
    return case.product_flops * (2 if case.task == "reference" else 1)


def _forward_backward_flops(case: LinearCase) -> int:
    return _forward_flops(case) + case.product_flops * (1 if case.task == "frozen" else 2)


def _forward_bytes(case: LinearCase) -> int:
    return case.weight_bytes * (2 if case.task == "reference" else 1)


def _forward_backward_bytes(case: LinearCase) -> int:
    return _forward_bytes(case) + case.weight_bytes * (1 if case.task == "frozen" else 2)


def make_inputs(case: LinearCase, device: torch.device) -> Inputs:
    """Random hidden states and weight, a response scored at the end of each sequence, a reference near the policy."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)

    S, T, D, V = case.sequences, case.tokens, case.hidden_size, case.vocab
    hidden, weight = normal(S, T, D), normal(V, D, std=LOGIT_STD / D**0.5)
    labels = torch.randint(0, V, (S, T), generator=generator, device=device)
    labels[:, : T - case.scored_per_sequence] = IGNORE_INDEX
    ref_hidden = ref_weight = None
    if case.task == "reference":
        ref_hidden = (hidden + normal(S, T, D, std=0.1)).to(case.dtype)
        ref_weight = weight.to(case.dtype, copy=True)
    return Inputs(
        case.task,
        hidden.to(case.dtype).requires_grad_(),
        weight.to(case.dtype).requires_grad_(case.task != "frozen"),
        labels,
        ref_hidden,
        ref_weight,
    )


def fresh(inputs: Inputs) -> Inputs:
    """Equal hidden states and weight in other memory."""
    hidden, weight = (x.detach().clone().requires_grad_(x.requires_grad) for x in (inputs.hidden, inputs.weight))
    return Inputs(inputs.task, hidden, weight, inputs.labels, inputs.ref_hidden, inputs.ref_weight)


def _run_forward(fn: LossFromHidden, inputs: Inputs) -> None:
    with torch.no_grad():
        fn(inputs)


def _run_forward_backward(fn: LossFromHidden, inputs: Inputs) -> None:
    torch.autograd.grad(fn(inputs)[0], inputs.leaves)


@dataclass(frozen=True)
class Truth:
    """Results in fp64."""

    nats: Tensor  # as the second result of `LossFromHidden`
    gradients: list[Tensor]  # of the leaves


def make_truth(inputs: Inputs) -> Truth:
    """The eager reference of the package in fp64, a few rows at a time, and the loss by its formula."""
    rows = inputs.labels[:, 1:].flatten()
    scored = (rows != IGNORE_INDEX).nonzero().squeeze(1)
    S, T_out = inputs.labels.shape[0], inputs.labels.shape[1] - 1
    targets, sequence = rows[scored], scored // T_out
    hidden = inputs.hidden.detach()[:, :-1].flatten(0, 1)[scored]
    weight = inputs.weight.detach().double()

    def logps_of(x: Tensor, w: Tensor, part: slice) -> Tensor:
        return reference.token_logps(
            (x @ w.t()).unsqueeze(0), targets[part].unsqueeze(0), ScoringOptions(shift=False)
        ).squeeze(0)

    parts = [slice(start, start + ROWS_PER_CHUNK) for start in range(0, len(scored), ROWS_PER_CHUNK)]
    logps = torch.cat([logps_of(hidden[part].double(), weight, part) for part in parts])
    if inputs.ref_hidden is not None and inputs.ref_weight is not None:
        ref_hidden = inputs.ref_hidden[:, :-1].flatten(0, 1)[scored]
        ref_weight = inputs.ref_weight.double()
        logps = logps - torch.cat([logps_of(ref_hidden[part].double(), ref_weight, part) for part in parts])
        del ref_weight
    sums = torch.zeros(S, dtype=torch.float64, device=logps.device).index_add(0, sequence, logps).requires_grad_()
    if inputs.task == "nll":
        loss, nats = -sums.sum() / len(scored), sums.sum().unsqueeze(0)
    else:
        chosen, rejected = sums.chunk(2)
        loss, nats = -logsigmoid(BETA * (chosen - rejected)).mean(), sums
    (upstream,) = torch.autograd.grad(loss, sums)

    grad_rows, grad_weight = torch.zeros_like(hidden, dtype=torch.float64), torch.zeros_like(weight)
    for part in parts:
        logits = (hidden[part].double() @ weight.t()).requires_grad_()
        y = reference.token_logps(logits.unsqueeze(0), targets[part].unsqueeze(0), ScoringOptions(shift=False)).squeeze(
            0
        )
        (grad_logits,) = torch.autograd.grad(y, logits, upstream[sequence[part]])
        grad_rows[part] = grad_logits @ weight
        if inputs.task != "frozen":
            grad_weight.addmm_(grad_logits.t(), hidden[part].double())
    grad_hidden = torch.zeros(S, T_out + 1, hidden.shape[-1], dtype=torch.float64, device=hidden.device)
    grad_hidden[:, :-1].view(S, T_out, -1)[rows.view(S, T_out) != IGNORE_INDEX] = grad_rows
    return Truth(nats.detach(), [grad_hidden] if inputs.task == "frozen" else [grad_hidden, grad_weight])


def measure_errors(fn: LossFromHidden, inputs: Inputs, truth: Truth) -> Errors:
    """Of log-probs or log ratios, forward both with and without a gradient asked; of a gradient element."""
    with torch.no_grad():
        _, plain = fn(inputs)
    own = fresh(inputs)
    loss, nats = fn(own)
    gradients = torch.autograd.grad(loss, own.leaves)
    return {
        "nats": worst(_largest(plain - truth.nats), _largest(nats - truth.nats)),
        "gradient": worst(*map(_gradient_error, gradients, truth.gradients)),
    }


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def _gradient_error(grad: Tensor, true: Tensor) -> float:
    """Of an element, relative to it plus the root mean square of its row; rows that are not scored must be zero."""
    largest = 0.0
    for rows, true_rows in zip(grad.flatten(0, -2).split(4096), true.flatten(0, -2).split(4096), strict=True):
        unit = true_rows.abs() + true_rows.square().mean(-1, keepdim=True).sqrt()
        error = (rows.double() - true_rows).abs()
        largest = worst(largest, torch.where(error == 0, 0.0, error / unit).max().item())
    return largest


def roundings(inputs_dtype: torch.dtype, results_dtype: torch.dtype) -> Errors:
    """Log-probs are results, in nats; gradients have the dtype of the inputs."""
    return {"nats": TYPICAL_NATS * rounding(results_dtype), "gradient": rounding(inputs_dtype)}


def _grid(rows: list[tuple[Task, int, int, int, int, torch.dtype, int]]) -> tuple[LinearCase, ...]:
    return tuple(LinearCase(*row) for row in rows)


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# The head of SmolLM2-135M. Bars first, then curves over rows, the scored share, V and D.
CPU_GRID = _grid(
    [
        *(("policy", 4, 128, 576, 49152, dtype, 50) for dtype in (FP32, BF16)),
        *((task, 4, 128, 576, 49152, FP32, 50) for task in ("reference", "frozen", "nll")),
        ("policy", 4, 512, 576, 49152, FP32, 50),
        *(("policy", 4, tokens, 576, 49152, FP32, 50) for tokens in (32, 64, 256)),
        *(("policy", 4, 128, 576, 49152, FP32, percent) for percent in (10, 25, 100)),
        *(("policy", 4, 128, 576, vocab, FP32, 50) for vocab in (16384, 32001, 128256)),
        *(("policy", 4, 128, hidden_size, 49152, FP32, 50) for hidden_size in (256, 2048)),
        ("frozen", 4, 128, 576, 49152, BF16, 50),
        *(("policy", 4, tokens, 576, 49152, BF16, 50) for tokens in (16, 1024)),
        *(("policy", 4, 128, 576, vocab, BF16, 50) for vocab in (32001, 152064)),
        *(("policy", 4, 128, 2048, vocab, BF16, 50) for vocab in (49152, 152064)),
        ("policy", 4, 1024, 2048, 32001, BF16, 50),
        *(("policy", 4, tokens, 4096, 32001, BF16, 50) for tokens in (16, 128)),
    ]
)
# The targets: 4096 of 8192 rows, D=4096, V=128256. Then share, V, D, rows and the other dtypes.
CUDA_GRID = _grid(
    [
        *((task, 4, 2048, 4096, 128256, BF16, 50) for task in ("policy", "reference", "frozen", "nll")),
        *(("policy", 4, 2048, 4096, 128256, BF16, percent) for percent in (25, 100)),
        *(("policy", 4, 2048, 4096, vocab, BF16, 50) for vocab in (32000, 50257, 152064, 262144)),
        *(("policy", 4, 2048, hidden_size, 128256, BF16, 50) for hidden_size in (1024, 2048, 8192)),
        *(("policy", 4, tokens, 4096, 128256, BF16, 50) for tokens in (128, 512, 4096)),
        ("reference", 2, 4000, 4096, 128256, BF16, 50),  # log ratios over 2,000 tokens
        *(("policy", 4, 2048, 4096, 128256, dtype, 50) for dtype in (FP16, FP32)),
        ("policy", 4, 2048, 576, 49152, BF16, 50),
    ]
)
QUICK_GRID = _grid(
    [
        ("policy", 4, 8, 24, 1003, FP32, 50),
        ("reference", 4, 8, 24, 1000, BF16, 50),
        ("frozen", 4, 8, 24, 1000, FP32, 100),
        ("nll", 4, 8, 24, 1000, FP32, 50),
    ]
)

FORWARD = Pass(
    "forward",
    "one product of the scored rows and the weight (two with a reference); read the weight",
    "nats",
    _run_forward,
    _forward_bytes,
    _forward_flops,
)
FORWARD_BACKWARD = Pass(
    "forward+backward",
    "three products (one more with a reference, one less with a frozen weight); forward: read the weight; backward: "
    "read it, write its gradient",
    "gradient",
    _run_forward_backward,
    _forward_backward_bytes,
    _forward_backward_flops,
)

LINEAR = Family(
    name="linear",
    title="Preference loss (DPO) or cross entropy from hidden states and the head",
    error_words="forward: of a sequence's log-prob or log ratio, in nats; forward+backward: of a gradient element, "
    "relative to it + the root mean square of its row",
    passes=(FORWARD, FORWARD_BACKWARD),
    providers=PROVIDERS,
    baseline=BASELINE,
    baseline_words="the head over every row, then fp32 log_softmax over every row of a slice",
    grids={"cpu": CPU_GRID, "cuda": CUDA_GRID, "quick": QUICK_GRID},
    curves={
        "rows": "{task}, D={hidden_size}, V={vocab}, {dtype}, {scored_percent}% scored",
        "scored_percent": "{task}, {rows} rows, D={hidden_size}, V={vocab}, {dtype}",
        "vocab": "{task}, {rows} rows, D={hidden_size}, {dtype}, {scored_percent}% scored",
        "hidden_size": "{task}, {rows} rows, V={vocab}, {dtype}, {scored_percent}% scored",
    },
    curve_value="p50_ms",
    columns=("median ms", "p20 - p80", "TFLOP/s", "of floor", "x baseline", "max error", "peak MB"),
    make_inputs=make_inputs,
    fresh=fresh,
    make_truth=make_truth,
    measure_errors=measure_errors,
    yardstick=eager_loss,
    roundings=roundings,
)
