"""The compiled PTX of the head between its matrix products, tile by tile and row by row, against fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptxemu.common import Check, install, options

torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN

given = options(__doc__.splitlines()[0])
executor = install(given)

from dil_kernels.kernels import head_rows, scalar_math  # noqa: E402
from dil_kernels.kernels import linear_head as head  # noqa: E402
from dil_kernels.ops.head_steps import CppSteps, Head, HeadProcessing, Rows  # noqa: E402

STATE = ("reference", "rest", "label", "largest other", "dot", "total", "label uncapped")
RTOL = {torch.float32: 3e-5, torch.bfloat16: 2.0**-8 * 1.02, torch.float16: 2.0**-10}
ATOL = {torch.float32: 1e-35, torch.bfloat16: 1e-35, torch.float16: 6.2e-8}
SHAPES = (  # dtype of the gradient, entries, rows, hidden size
    (torch.float32, 31, 3, 40),
    (torch.bfloat16, 1000, 4, 1500),
    (torch.float16, 4096, 4, 64),
    (torch.bfloat16, 8192, 3, 2048),
    (torch.float32, 8192, 3, 64),
    (torch.bfloat16, 5376, 4, 100),
    (torch.bfloat16, 1, 5, 16),
)
MODES = (  # bias, softcap, statistics, what becomes of the gradient
    (False, 0.0, False, "kept"),
    (True, 20.0, True, "sums"),
    (False, 0.0, True, "inference"),
    (True, 0.0, False, "sums"),
    (False, 15.0, False, "kept"),
)


def capped(x: Tensor, bias: Tensor | None, scale: float, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits before and after softcapping, and their slope, in fp64."""
    y = (x.double() if bias is None else x.double() + bias.double()) * scale
    if not cap:
        return y, y, torch.ones_like(y)
    return y, cap * torch.tanh(y / cap), 1.0 / torch.cosh(y / cap) ** 2


def tile_truth(
    y: Tensor, z: Tensor, slope: Tensor, label: Tensor, state: Tensor, inverse_temperature: float, slack: float
) -> tuple[Tensor, Tensor, Tensor]:
    """State [7, R] after a tile of logits y [R, n], z capped, gradient [R, n], and the factor [R] of earlier sums."""
    state = state.double().clone()
    here = ((label >= 0) & (label < z.shape[1])).nonzero()[:, 0]
    others = z.clone()
    others[here, label[here]] = -math.inf
    largest = others.amax(-1)
    others_uncapped = y.clone()
    others_uncapped[here, label[here]] = -math.inf
    reference, rest, of_label, largest_other, dot, total, uncapped = state
    total += z.sum(-1) * 2.0**-24
    of_label[here] = z[here, label[here]]
    if not torch.equal(y, z):
        uncapped[here] = y[here, label[here]]
    renewed = torch.where(largest > reference + slack, largest, reference)
    origin = torch.where(renewed == -math.inf, 0.0, renewed)
    change = torch.where(reference == -math.inf, 0.0, reference - origin)
    factor = torch.where(renewed == reference, 1.0, torch.exp(change * inverse_temperature))
    d = others - origin[:, None]
    s = torch.exp(d * inverse_temperature)
    largest_other.copy_(torch.maximum(largest_other, others_uncapped.amax(-1)))
    moved = factor * (dot + torch.where(rest == 0, 0.0, change * rest))
    dot.copy_(torch.where(renewed == reference, dot, moved) + torch.where(s == 0, 0.0, s * d).sum(-1))
    rest.copy_(rest * factor + s.sum(-1))
    reference.copy_(renewed)
    return state, -s * slope, factor


def grad_again(z: Tensor, slope: Tensor, label: Tensor, state: Tensor, inverse_temperature: float) -> Tensor:
    """The gradient of a tile once the state is that of the whole row."""
    reference = torch.where(state[0] == -math.inf, 0.0, state[0]).double()
    grad = -torch.exp((z - reference[:, None]) * inverse_temperature) * slope
    here = ((label >= 0) & (label < z.shape[1])).nonzero()[:, 0]
    grad[here, label[here]] = state[1].double()[here] * slope[here, label[here]]
    return grad


def check_tile(check: Check, gen: torch.Generator, dtype: torch.dtype, n: int, R: int, D: int, mode: tuple) -> None:
    with_bias, cap, statistics, kind = mode
    what = (str(dtype)[6:], f"{R} x {n}", "bias" if with_bias else "", f"cap {cap}", kind)
    start, scale, inverse_temperature, slack = (8192, 0.5, 1 / 0.7, 4 * 0.7) if statistics else (64, 1.0, 1.0, 4.0)
    tile = torch.randn(R, n, generator=gen) * 5
    bias = torch.randn(n + 3, generator=gen)[1 : n + 1] if with_bias else None  # an odd slice
    label = torch.randint(0, n, (R,), generator=gen)
    label[0] = -5  # of an earlier tile
    state = torch.zeros(7, R)
    state[0] = torch.tensor([-math.inf, 3.0, 60.0, -math.inf, 1.0])[:R]
    state[1] = torch.tensor([0.0, 2.5, 1.5, 0.0, 3.0])[:R]
    state[2], state[3], state[5] = math.nan, state[0], 2.0**-24
    state[4] = torch.where(state[1] > 0, -0.3, 0.0)
    sums = torch.randn(R, D, generator=gen) if kind == "sums" else None
    y, z, slope = capped(tile, bias, scale, cap)
    wanted_state, wanted_grad, factor = tile_truth(y, z, slope, label, state, inverse_temperature, slack)
    wanted_sums = None if sums is None else sums.double() * factor[:, None]

    stash, grad, over_the_tile = None, None, kind == "sums" and dtype == torch.float32
    original = tile.clone()
    if kind == "kept":
        stash = torch.full((R, -(-(n + 100) // 64) * 64), 5.0, dtype=dtype)
        grad = stash[:, 16 : 16 + n]
    elif kind == "sums":
        grad = tile if over_the_tile else torch.full((R, n), math.nan, dtype=dtype)
    how = (start, scale, cap, inverse_temperature)
    reference = torch.full((R,), math.nan) if kind == "kept" else None
    head.head_tile(tile, bias, label + start, state, grad, sums, *how, slack, statistics, reference=reference)
    check.launched(what)
    if reference is not None:
        check.expect(what, torch.equal(reference, state[0]), "the copy of the reference is another")
    for k, name in enumerate(STATE):
        if k not in (3, 4, 5) or statistics:
            check.close(what, name, state[k], wanted_state[k], 1e-5, 1e-11 if name == "total" else 1e-5)
    if grad is not None:
        check.close(what, "gradient", grad, wanted_grad, RTOL[dtype], ATOL[dtype])
    if sums is not None:
        check.close(what, "sums", sums, wanted_sums, 1e-5, 1e-30)
    if stash is not None:
        around = torch.cat([stash[:, :16], stash[:, 16 + n :]], 1)
        check.expect(what, bool((around == 5).all()), "something around the tile's part of the stash was overwritten")

    again = torch.full((R, n), math.nan, dtype=dtype)
    head.head_tile_grad(original, bias, label + start, state, again, *how)
    check.launched(what)
    wanted = grad_again(z, slope, label, state, inverse_temperature)
    check.close(what, "gradient again", again, wanted, RTOL[dtype], ATOL[dtype])


def check_rescale(check: Check, gen: torch.Generator, dtype: torch.dtype, n: int, R: int) -> None:
    what = ("rescale", str(dtype)[6:], n)
    V, columns, inverse_temperature = n + 7, max(1, n // 2 // 16 * 16 or 16), 1 / 0.7
    whole = torch.randn(R, -(-V // 64) * 64, generator=gen).to(dtype)
    before, stash = whole.clone(), whole[:, :V]
    references = torch.randn(-(-V // columns), R, generator=gen)
    last, norm = references.amax(0), torch.ones(R)
    norm[0] = 0.25
    references[:, 1] = last[1] = -math.inf
    labels, label_grad = torch.randint(0, V, (R,), generator=gen), torch.rand(R, generator=gen)
    labels[-1], labels[-2] = -1, V  # without an entry
    head.head_rescale(stash, references, last, labels, label_grad, norm, columns, inverse_temperature)
    check.launched(what)
    ratio = torch.where(references == last, 0.0, (references - last).double()).mul(inverse_temperature).exp() * norm
    wanted = before.double()[:, :V] * ratio.repeat_interleave(columns, 0)[:V].t()
    here = torch.arange(R)[(labels >= 0) & (labels < V)]
    wanted[here, labels[here]] = (label_grad * norm).double()[here]
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    check.close(what, "rescaled", stash, wanted, rtol, 1e-7)
    unchanged = torch.arange(V) != labels[1]
    untouched = torch.equal(whole[:, V:], before[:, V:]) and torch.equal(
        whole[1, :V][unchanged], before[1, :V][unchanged]
    )
    check.expect(what, untouched, "what was not to be rescaled changed")


def check_rows(check: Check, gen: torch.Generator, dtype: torch.dtype, N: int, M: int, D: int) -> None:
    """Selecting, gathering, scattering: exact, or one rounding."""
    what = ("rows", str(dtype)[6:], N, M, D)
    targets = torch.randint(0, 50, (N,), generator=gen)
    targets[torch.rand(N, generator=gen) < 0.4] = -100
    index, labels = torch.empty(2, M, dtype=torch.int64)
    logps, statistics = torch.empty(N), torch.empty(3, N)
    head_rows.select_rows(targets, -100, M, index, labels, logps, statistics)
    check.launched(what)
    scored = (targets != -100).nonzero()[:, 0]
    wanted = torch.cat([scored, torch.full((M,), N)])[:M]
    padded = torch.cat([targets, torch.zeros(1, dtype=torch.int64)])
    beyond = torch.zeros(N)
    beyond[scored[M:]] = math.nan
    check.expect(what, torch.equal(index, wanted) and torch.equal(labels, padded[wanted]), "other rows were selected")
    for values in (logps, *statistics[:2]):
        check.close(what, "log-probs to begin with", values, beyond.double(), 0.0, 0.0)
    check.expect(what, not statistics[2].any(), "hits to begin with")

    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    values = torch.randn(N, D + 3, generator=gen).to(dtype)[:, :D]
    grad_logps, factor = torch.randn(2 * N, generator=gen)[::2], torch.rand(M, generator=gen)
    coefs = head_rows.coefficients(grad_logps, index, factor, 0.7)
    padded_grad = torch.cat([grad_logps, torch.zeros(1)]).double()
    check.launched(what)
    check.close(what, "coefficients", coefs, 0.7 * factor.double() * padded_grad[index], 1e-6, 0.0)
    padded_values = torch.cat([values, torch.zeros(1, D, dtype=dtype)]).double()
    for scale in (None, coefs):
        gathered = head_rows.gather_rows(values, index, scale, torch.full((M, D), math.nan, dtype=dtype))
        check.launched(what)
        wanted = padded_values[index] * (1.0 if scale is None else scale.double()[:, None])
        check.close(what, "gathered", gathered, wanted, rounding, 1e-7)
    out = torch.zeros(N, D, dtype=dtype)
    head_rows.scatter_rows(gathered, index, coefs, out)
    check.launched(what)
    wanted = torch.zeros(N + 1, D, dtype=torch.float64)
    wanted[index] = gathered.double() * coefs.double()[:, None]
    check.close(what, "scattered", out, wanted[:N], rounding, 1e-7)


def check_finish(check: Check, gen: torch.Generator, dtype: torch.dtype, R: int, cap: float) -> None:
    """Against the steps of the CPU in fp64."""
    what = ("finish", str(dtype)[6:], R, cap)
    N, V, D, T = R + 5, 1000, 70, 0.7
    state = torch.randn(7, R, generator=gen) * 3
    state[1] = torch.rand(R, generator=gen) * 90
    state[0], state[1, 1::7], state[0, 2::7] = 10 + state[0], 0.0, -60.0
    state[2, 3::7] = 40.0
    labels = torch.randint(0, V, (R,), generator=gen)
    labels[4::7], state[2, 4::7] = V, math.nan
    index = torch.randperm(N, generator=gen)[:R]
    index[-1] = N
    weight = torch.randn(V, D, generator=gen).to(dtype)
    sums = torch.randn(R, D, generator=gen)

    def rows_in(accumulated: torch.dtype) -> Rows:
        results = (torch.zeros(size, dtype=accumulated) for size in (N, 3 * N, R, R, R))
        logps, statistics, *of_rows = results
        return Rows(index, labels, logps, statistics.view(3, N), *of_rows)

    rows, true = rows_in(torch.float32), rows_in(torch.float64)
    exact = CppSteps(Head(weight, None, HeadProcessing(1.0, cap, T, 64, 64)), True)
    true_label_grad, true_norm = exact.finish(state.double(), true, V)
    of_rows = (rows.logps, rows.statistics, rows.reference, rows.rest, rows.factor)
    label_grad, norm = head_rows.finish_rows(state, index, *of_rows, V, cap, T, dtype == torch.float16)
    out = torch.empty(R, D, dtype=dtype)
    head_rows.finish_sums(sums, weight, labels, label_grad, norm, out)
    check.launched(what)
    for name in ("logps", "statistics", "reference", "rest", "factor"):  # 60 nats in fp32 are within 4e-6
        check.close(what, name, getattr(rows, name), getattr(true, name), 8e-6, 1e-6 if name == "statistics" else 1e-30)
    check.close(what, "label_grad", label_grad, true_label_grad, 1e-5, 1e-30)
    check.close(what, "norm", norm, true_norm, 0.0, 0.0)
    true_out = torch.empty(R, D, dtype=torch.float64)
    exact.finish_sums(sums.double(), labels, true_label_grad, true_norm, true_out)
    check.close(what, "sums", out, true_out, RTOL[dtype] * 1.1, 1e-5)


def main() -> None:
    check = Check(
        executor, stop_early=given.plant is not None, sources=[head.__file__, head_rows.__file__, scalar_math.__file__]
    )
    gen = torch.Generator().manual_seed(1)
    for dtype, n, R, D in SHAPES:
        for mode in MODES:
            check_tile(check, gen, dtype, n, R, D, mode)
        check_rescale(check, gen, dtype, n, R)
    for dtype, cap in ((torch.float32, 0.0), (torch.bfloat16, 20.0), (torch.float16, 0.0)):
        check_finish(check, gen, dtype, 300, cap)
        for N, M, D in ((5000, 4000, 7), (70, 30, 2100), (3, 0, 5)):
            check_rows(check, gen, dtype, N, M, D)
    check.finish()


if __name__ == "__main__":
    main()
