"""The log-prob kernels' compiled PTX against fp64: every layout, split or not, softcapping, statistics, in place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ptxemu.common import ARCHITECTURES, Check, install, options

torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN

given = options(__doc__.splitlines()[0])
executor = install(given)

import dil_kernels.ops.logps  # noqa: E402, F401  registers the ops
from dil_kernels.kernels import launch, linear_head, logps, rows, scalar_math  # noqa: E402

ops = torch.ops.dil_kernels
SOURCES = [module.__file__ for module in (linear_head, logps, rows, scalar_math)]
IGNORE = -100
RTOL = {torch.float32: 2e-5, torch.bfloat16: 2.0**-8 * 1.02, torch.float16: 2.0**-10 * 1.02}  # of a gradient
ATOL = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 6.2e-8}


@dataclass
class Truth:
    """In fp64, of logits [B, T, V] and labels [B, T]."""

    logps: Tensor  # [B, T_out]
    statistics: Tensor  # [3, B, T_out]: mean logit, entropy, top-1 hit
    log_softmax: Tensor  # [B, T_out, V]
    label: Tensor  # [B, T_out], 0 where it is out of range
    kept: Tensor  # [B, T_out] bool

    @classmethod
    def of(cls, x: Tensor, y: Tensor, shift: bool, cap: float, temperature: float) -> Truth:
        z = x.double()
        z = (cap * torch.tanh(z / cap) if cap else z) / temperature
        z, y = (z[:, :-1], y[:, 1:]) if shift else (z, y)
        kept, bad = y != IGNORE, (y < 0) | (y >= x.shape[-1])
        label = y.masked_fill(bad, 0)
        log_softmax = z.log_softmax(-1)
        of_label = log_softmax.gather(-1, label[..., None])[..., 0]
        p = log_softmax.exp()
        entropy = -torch.where(p == 0, 0.0, p * log_softmax).sum(-1)
        hit = (z.gather(-1, label[..., None])[..., 0] >= z.amax(-1)).double()
        found = [of_label, z.mean(-1), entropy, hit]
        found = [value.masked_fill(bad, torch.nan) for value in found]
        found[3] = torch.where(found[0].isnan(), 0.0, found[3])
        found = [value.masked_fill(~kept, 0.0) for value in found]
        return cls(found[0], torch.stack(found[1:]), log_softmax, label, kept)

    def grad(self, x: Tensor, g: Tensor, cap: float, temperature: float) -> Tensor:
        """Of the logits, for the gradient g [B, T_out] of the log-probs."""
        d = -self.log_softmax.exp()
        d.scatter_(-1, self.label[..., None], -torch.expm1(self.log_softmax.gather(-1, self.label[..., None])))
        d *= g.double()[..., None] / temperature
        if cap:
            d /= torch.cosh(x[:, : d.shape[1]].double() / cap) ** 2
        d[~self.kept] = 0.0
        full = torch.zeros(x.shape, dtype=torch.float64)
        full[:, : d.shape[1]] = d
        return full


def layouts(
    B: int, T: int, V: int, dtype: torch.dtype, gen: torch.Generator, scale: float
) -> Iterator[tuple[str, Tensor]]:
    """Logits of several strides; what is not theirs holds NaN."""

    def values(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=gen) * scale).to(dtype)

    yield "contiguous", values(B, T, V)
    for name, before, after in (("rows off 16 bytes", 3, 8), ("padded rows", 0, -V % 64 + 64)):
        buffer = torch.full((B, T, before + V + after), torch.nan, dtype=dtype)
        buffer[..., before : before + V] = values(B, T, V)
        yield name, buffer[..., before : before + V]
    buffer = torch.full((T, B, V + 1), torch.nan, dtype=dtype)
    buffer[..., 1:] = values(T, B, V)
    yield "time major, off by one", buffer[..., 1:].transpose(0, 1)


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, but for the payload of NaN."""
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) and torch.equal(one.isnan(), other.isnan())


def check_backward(
    check: Check, what: tuple[object, ...], x: Tensor, y: Tensor, how: tuple, saved: tuple, truth: Truth
) -> None:
    """Out of place and in place; what surrounds the logits stays as it was."""
    cap, temperature = how[2:]
    gen = torch.Generator().manual_seed(3)
    g = torch.randn(truth.logps.shape, generator=gen)
    strided = torch.stack([g, g], -1)[..., 1] if cap else g
    wanted = truth.grad(x, g, cap, temperature)
    before = x.clone()
    dx = ops.logps_bwd.triton(strided, x, y, *saved, *how)
    check.launched(what)
    check.expect(what, same(before, x), "the logits were written to")
    check.close(what, "grad", dx, wanted, RTOL[x.dtype], ATOL[x.dtype])

    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    copy = storage.clone()
    over = copy.as_strided(x.size(), x.stride(), x.storage_offset())
    ours = torch.zeros(copy.shape, dtype=torch.bool)
    ours.as_strided(x.size(), x.stride(), x.storage_offset()).fill_(True)
    ops.logps_bwd_.triton(strided, over, y, *saved, *how)
    check.launched(what)
    check.close(what, "grad in place", over, wanted, RTOL[x.dtype], ATOL[x.dtype])
    check.expect(what, given.noise is not None or same(over, dx), "in place and out of place differ")
    check.expect(what, same(copy[~ours], storage[~ours]), "something around the logits was overwritten")


def main() -> None:
    check = Check(executor, stop_early=given.plant is not None, sources=SOURCES)
    # 32999: three tiles of the largest shape, one of them whole, or eight parts of a row.
    vocabularies = (31, 1009, 4096, 50257, 128256) if given.full else (1009, 32999)
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if given.full else (torch.bfloat16, torch.float32)
    modes = ((0.0, False, 1.0), (0.0, True, 0.7), (20.0, False, 1.0), (20.0, True, 1.3))
    for dtype, V, (cap, statistics, temperature) in itertools.product(dtypes, vocabularies, modes):
        for num_sms in (132, 1) if V >= 8192 else (132,):  # few rows for the GPU are split over the vocabulary
            launch.device_of = lambda device, sms=num_sms: launch.Device(ARCHITECTURES[given.arch], sms)
            gen = torch.Generator().manual_seed(V + int(10 * temperature))
            B, T = 2, 4
            for layout, x in layouts(B, T, V, dtype, gen, 15.0 if cap else 4.0):
                if not given.full and layout not in ("contiguous", "rows off 16 bytes"):
                    continue
                y = torch.randint(0, V, (B, T), generator=gen)
                y[0, 1:4] = torch.tensor([IGNORE, 0, V - 1])
                y[1, 1:3] = torch.tensor([V if statistics else 7 % V, min(V - 1, 5)])  # V is out of range
                x[0, 2, V - 1] = 30.0  # a row that its label dominates
                x[1, 1, torch.rand(V, generator=gen) < 0.3] = -torch.inf
                x[1, 1, min(V - 1, 5)] = 1.0
                labels = torch.stack([y, y], -1)[..., 0] if statistics else y
                shifts = (True, False) if layout == "contiguous" else (True,)
                if V >= 8192 and not given.full:  # addresses are those of few logits
                    shifts = (layout == "contiguous",)
                for shift in shifts:
                    what = (str(dtype)[6:], V, f"cap {cap}", f"temperature {temperature}", f"{num_sms} SMs", layout)
                    truth = Truth.of(x, y, shift, cap, temperature)
                    how = (IGNORE, shift, cap, temperature)
                    token_logps, row_max, log_sum, measured = ops.logps_fwd.triton(x, labels, *how, statistics)
                    check.launched(what)
                    check.close(what, "logps", token_logps, truth.logps, 4e-6, 4e-6)
                    for saved in (token_logps, row_max, log_sum):
                        check.expect(what, not saved[~truth.kept].any(), "an ignored row is not 0")
                    if statistics:
                        for k, (name, rtol, atol) in enumerate(
                            (("mean logit", 1e-5, 2e-6), ("entropy", 2e-5, 4e-6), ("top-1 hit", 0.0, 1e-30))
                        ):
                            check.close(what, name, measured[k], truth.statistics[k], rtol, atol)
                    elif num_sms > 1 or given.full:  # by which only the forward goes
                        check_backward(check, what, x, labels, how, (row_max, log_sum), truth)
        print(str(dtype)[6:], V, f"cap {cap}", "statistics" if statistics else "", len(check.failures), flush=True)
    check.finish()


if __name__ == "__main__":
    main()
