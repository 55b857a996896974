"""What the machine itself can do, measured in the same rounds as the providers: copying, and multiplying matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from harness.timing import Call, Quantiles

CPU_COPY_BYTES = 256 << 20
CUDA_COPY_BYTES = 2 << 30
CPU_GEMM_SIZE = 1024
CUDA_GEMM_SIZE = 8192
QUICK_SHIFT = 5  # a quick run copies and multiplies 2^5 times less

COPY, GEMM = "copy", "gemm"


class Copy:
    """A large `Tensor.copy_` between two buffers that exist already: the ceiling for reading and writing."""

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        nbytes = (CUDA_COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES) >> (QUICK_SHIFT if quick else 0)
        self.source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
        self.target = torch.zeros_like(self.source)

    def __call__(self, i: int) -> None:
        """Copy once; the argument is that of every timed call."""
        self.target.copy_(self.source)

    def gbps(self, milliseconds: float) -> float:
        """Bytes read plus bytes written a second, in 1e9, of a copy that took so long."""
        return 2 * self.source.nbytes / milliseconds / 1e6


class Gemm:
    """A large square `torch.mm` in a dtype, into a buffer that exists already: the ceiling for multiplying."""

    def __init__(self, device: torch.device, dtype: torch.dtype, quick: bool = False) -> None:
        self.size = (CUDA_GEMM_SIZE if device.type == "cuda" else CPU_GEMM_SIZE) // (8 if quick else 1)
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.size, self.size)
        # Random values: matrices of one value switch fewer transistors and so run at a higher clock.
        self.a, self.b = (torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator) for _ in range(2))
        self.out = torch.empty_like(self.a)

    def __call__(self, i: int) -> None:
        """Multiply once; the argument is that of every timed call."""
        torch.mm(self.a, self.b, out=self.out)

    def tflops(self, milliseconds: float) -> float:
        """1e12 FLOPs a second, of a product that took so long; a multiplication and an addition are two."""
        return 2 * self.size**3 / milliseconds / 1e9


@dataclass(frozen=True)
class Rates:
    """What the ceilings reached in some rounds."""

    copy_gbps: float
    gemm_tflops: float | None  # None where it was not measured

    def floor_ms(self, nbytes: int, flops: int | None) -> float:
        """The longer of the time to move so many bytes and the time to do so many FLOPs."""
        moving = nbytes / self.copy_gbps / 1e6
        return moving if flops is None or self.gemm_tflops is None else max(moving, flops / self.gemm_tflops / 1e9)


class Ceilings:
    """The ceilings of a device, whose buffers are made once a run."""

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self.device, self.quick = device, quick
        self.copy = Copy(device, quick)
        self._gemms: dict[torch.dtype, Gemm] = {}

    def _gemm(self, dtype: torch.dtype) -> Gemm:
        if dtype not in self._gemms:
            self._gemms[dtype] = Gemm(self.device, dtype, self.quick)
        return self._gemms[dtype]

    def calls(self, gemm_dtype: torch.dtype | None) -> dict[str, Call]:
        """To be timed beside the providers; the product only where its dtype is given."""
        return {COPY: self.copy} | ({} if gemm_dtype is None else {GEMM: self._gemm(gemm_dtype)})

    def rates(self, times: Mapping[str, Quantiles], gemm_dtype: torch.dtype | None) -> Rates:
        """From what `calls` took, by their medians."""
        tflops = None if gemm_dtype is None else self._gemm(gemm_dtype).tflops(times[GEMM].p50)
        return Rates(self.copy.gbps(times[COPY].p50), tflops)
