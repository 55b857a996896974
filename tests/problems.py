"""Hypothesis strategies: logits, labels, packed boundaries, and what is hard about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

IGNORE = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 2, 15, 16, 17, 31, 64, 100, 257, 1000, 1024, 1025, 2049, 5003, 9001)


@dataclass
class Problem:
    logits: Tensor  # [B, T, V]
    labels: Tensor  # [B, T]
    grad: Tensor  # [B, T - shift], fp32, non-uniform
    shift: bool
    softcapping: float | None
    temperature: float

    @property
    def how(self) -> dict[str, float | bool | None]:
        """The options of token_logps that are part of the problem."""
        return {
            "shift": self.shift,
            "final_logit_softcapping": self.softcapping,
            "temperature": self.temperature,
        }


def make_logits(gen: torch.Generator, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=gen, dtype=torch.float64)
    if kind == "typical":
        x = 4.0 * x
    elif kind == "large":
        x = 2000.0 * x
    elif kind == "certain":  # p -> 1 for one entry of each row
        x[..., 0] += 40.0
    elif kind == "constant":
        x = torch.full_like(x, 3.0)
    elif kind == "masked":  # a part of the vocabulary is excluded, as trainers do it
        x[..., 1::3] = -torch.inf
    elif kind == "lowest":
        x[..., 1::2] = torch.finfo(dtype).min
    return x.to(dtype)


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values under other strides."""
    B, T, V = x.shape
    if layout == "padded_rows":
        out = torch.full((B, T, V + 3), torch.nan, dtype=x.dtype)[..., :V]
    elif layout == "time_major":
        out = torch.empty(T, B, V, dtype=x.dtype).transpose(0, 1)
    elif layout == "sliced_batch":
        out = torch.full((2 * B, T + 2, V), torch.nan, dtype=x.dtype)[::2, 1 : T + 1]
    elif layout == "vocabulary_major":
        out = torch.empty(B, V, T, dtype=x.dtype).transpose(1, 2)
    else:
        return x
    return out.copy_(x)


@st.composite
def problems(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    vocabularies: tuple[int, ...] = VOCABULARIES,
    max_rows: int = 12,
) -> Problem:
    """Logits of any layout, labels with any mask, a non-uniform upstream gradient; rows without a label hold NaN."""
    dtype = draw(st.sampled_from(dtypes))
    V = draw(st.sampled_from(vocabularies))
    shift = draw(st.booleans())
    B = draw(st.integers(1, 3))
    T = draw(st.integers(1 + shift, max(1 + shift, max_rows // B)))
    kind = draw(st.sampled_from(("typical", "large", "certain", "constant", "masked", "lowest")))
    layout = draw(st.sampled_from(("contiguous", "padded_rows", "time_major", "sliced_batch", "vocabulary_major")))
    softcapping = draw(st.sampled_from((None, None, 5.0, 30.0)))
    temperature = draw(st.sampled_from((1.0, 0.5, 1.7)))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    labels = torch.randint(0, V, (B, T), generator=gen)
    mask = draw(st.sampled_from(("none", "some", "all", "prefix")))
    if mask == "some":
        labels[torch.rand(B, T, generator=gen) < 0.5] = IGNORE
    elif mask == "all":
        labels[:] = IGNORE
    elif mask == "prefix":
        labels[:, : T // 2] = IGNORE
    logits = make_logits(gen, (B, T, V), kind, dtype)
    targets = torch.cat([labels[:, 1:], labels.new_full((B, 1), IGNORE)], 1) if shift else labels
    logits[targets == IGNORE] = torch.nan
    grad = torch.randn((B, T - shift), generator=gen)
    if draw(st.booleans()):
        labels, grad = labels.t().contiguous().t(), grad.t().contiguous().t()
    return Problem(strided(logits, layout), labels, grad, shift, softcapping, temperature)


@st.composite
def boundaries(draw: st.DrawFn, num_sequences: int, max_length: int = 6) -> list[int]:
    """Lengths of packed sequences, empty ones included; at least 2 tokens in all."""
    lengths = draw(st.lists(st.integers(0, max_length), min_size=num_sequences, max_size=num_sequences))
    if sum(lengths) < 2:
        lengths[0] += 2
    return lengths
