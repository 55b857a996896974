"""NaN, infinities, extreme logits, labels out of range and a large vocabulary: the compiled PTX of the log-probs."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ptxemu.common import ARCHITECTURES, Check, install, options

torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN

given = options(__doc__.splitlines()[0])
executor = install(given)

import dil_kernels.ops.logps  # noqa: E402, F401  registers the ops
from dil_kernels.kernels import launch, logps, rows, scalar_math  # noqa: E402

ops = torch.ops.dil_kernels
SOURCES = [module.__file__ for module in (logps, rows, scalar_math)]
inf, nan = torch.inf, torch.nan


def special_rows(V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [1, 14, V] and labels [1, 14]; those of rows 11 and 12 are out of range."""
    gen = torch.Generator().manual_seed(V)
    x = (torch.randn(1, 14, V, generator=gen) * 3).to(dtype)
    y = torch.randint(0, V, (1, 14), generator=gen)
    row, label = x[0], y[0]
    row[0, 50], row[1, 60] = nan, inf
    row[2] = -inf
    for k, value in ((3, -inf), (4, inf), (5, nan), (7, 60000.0)):
        row[k, label[k]] = value
    row[6], row[8], row[9], row[10] = 3.0, -60000.0, -inf, 0.0
    row[9, label[9]], row[10, label[10]] = -3.0, -inf
    row[13, : V // 2] = -inf
    label[11], label[12] = V, -5
    return x, y


def check_special_rows(check: Check, V: int, dtype: torch.dtype, cap: float, num_sms: int) -> None:
    """Against the C++ ops, which the test suite compares with fp64 on the same kinds of rows."""
    launch.device_of = lambda device: launch.Device(ARCHITECTURES[given.arch], num_sms)
    what = (str(dtype)[6:], V, f"cap {cap}", f"{num_sms} SMs")
    x, y = special_rows(V, dtype)
    in_range = y.clamp(0, V - 1)
    kept = torch.ones(14, dtype=torch.bool)
    kept[11:13] = False
    for statistics in (False, True):
        actual = ops.logps_fwd.triton(x, y, -100, False, cap, 0.7, statistics)
        expected = ops.logps_fwd(x, in_range, -100, False, cap, 0.7, statistics)
        check.launched(what)
        check.close(what, "logps", actual[0][:, kept], expected[0][:, kept], 2e-5, 1e-5)
        check.expect(what, bool(actual[0][:, ~kept].isnan().all()), "a label out of range does not give NaN")
        if statistics:
            check.close(what, "statistics", actual[3][..., kept], expected[3][..., kept], 2e-5, 1e-5)
    g = torch.randn(1, 14, generator=torch.Generator().manual_seed(V))
    dx = ops.logps_bwd.triton(g, x, y, *actual[1:3], -100, False, cap, 0.7)
    wanted = ops.logps_bwd(g, x, in_range, *expected[1:3], -100, False, cap, 0.7)
    check.launched(what)
    check.close(what, "grad", dx[:, kept], wanted[:, kept], 2e-5 if dtype == torch.float32 else 2e-2, 1e-6)


def check_large_vocabulary(check: Check, dtype: torch.dtype, num_sms: int) -> None:
    """128256 entries, labels at both ends, against fp64."""
    launch.device_of = lambda device: launch.Device(ARCHITECTURES[given.arch], num_sms)
    what = (str(dtype)[6:], 128256, f"{num_sms} SMs")
    x = (torch.randn(1, 3, 128256, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    y = torch.tensor([[5, 128255, 70000]])
    truth = torch.log_softmax(x.double(), -1)
    token_logps, row_max, log_sum, _ = ops.logps_fwd.triton(x, y, -100, False, 0.0, 1.0, True)
    dx = ops.logps_bwd.triton(torch.ones(1, 3), x, y, row_max, log_sum, -100, False, 0.0, 1.0)
    check.launched(what)
    check.close(what, "logps", token_logps, truth.gather(-1, y[..., None])[..., 0], 1e-6, 1e-6)
    wanted = -truth.exp()
    wanted.scatter_add_(-1, y[..., None], torch.ones(1, 3, 1, dtype=torch.float64))
    check.close(what, "grad", dx, wanted, 2e-5 if dtype == torch.float32 else 2.0**-8 * 1.02, 1e-12)


def main() -> None:
    check = Check(executor, stop_early=given.plant is not None, sources=SOURCES)
    dtypes = (torch.bfloat16, torch.float32, torch.float16) if given.full else (torch.bfloat16, torch.float32)
    for V, dtype, cap, num_sms in itertools.product((100, 9001), dtypes, (0.0, 20.0), (1, 132)):
        check_special_rows(check, V, dtype, cap, num_sms)
    for dtype, num_sms in itertools.product(dtypes[:2], (1, 132) if given.full else (132,)):
        check_large_vocabulary(check, dtype, num_sms)
    check.finish()


if __name__ == "__main__":
    main()
