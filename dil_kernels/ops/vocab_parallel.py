"""A vocabulary that the processes of a group have in parts: what they tell each other of its rows.

Each process computes its shard, as if this were all, but for labels that lie in another one. Then the sums of a row are
brought to the largest maximum and added up: two all-reduces of a few numbers a row, on the device, without waiting for
it. They are functional collectives, which torch.compile traces. What comes back is the same on every process, bit by
bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dil_kernels.options import Processing

IGNORED = -1  # a label that is not scored, among labels that count from the start of a shard


class Shard(NamedTuple):
    """A part of the vocabulary.

    Attributes:
        group: name of the process group, whose processes have the parts in the order of their ranks.
        entries: of the part, V.
        offset: of its first entry in the whole; a tensor [] where only the device knows it.
        total: entries of the whole, likewise.
    """

    group: str
    entries: int
    offset: int | Tensor
    total: int | Tensor

    @property
    def share(self) -> float | Tensor:
        """Of the part in the whole."""
        return self.entries / self.total

    def own_labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels as entries of the part: V for those of another part or of none, IGNORED where not scored."""
        own = labels - self.offset
        own = torch.where((own < 0) | (own >= self.entries), self.entries, own)
        return own.masked_fill(labels == ignore_index, IGNORED)


def started_reduction(values: Tensor, how: str, group: str) -> Tensor:
    """The start of an all-reduce ("sum" or "max") of values over a group, whose result `finished` waits for."""
    _functional_collectives()
    return torch.ops._c10d_functional.all_reduce(values.contiguous(), how, group)


def finished(values: Tensor) -> Tensor:
    """The result of a collective. On CUDA its stream waits, not the host."""
    return torch.ops._c10d_functional.wait_tensor(values)


def reduced(values: Tensor, how: str, group: str) -> Tensor:
    """Values reduced over a group."""
    return finished(started_reduction(values, how, group))


def gathered(values: Tensor, processes: int, group: str) -> Tensor:
    """Values [n] of every process of a group, [processes, n]."""
    _functional_collectives()
    all_of_them = torch.ops._c10d_functional.all_gather_into_tensor(values.contiguous(), processes, group)
    return finished(all_of_them).view(processes, -1)


def _functional_collectives() -> None:
    """Import what registers them."""
    import torch.distributed._functional_collectives  # noqa: F401


def merged_head_state(
    state: Tensor,
    labels: Tensor,
    padding: Tensor,
    entries: int,
    total: int | Tensor,
    temperature: float,
    statistics: bool,
    group: str,
) -> Tensor:
    """The state [7, R] of rows over the whole vocabulary, from those over its parts.

    Args:
        state: over this part; see csrc/cpu/head_kernels.h.
        labels: [R], as of `Shard.own_labels`.
        padding: [R] bool, rows that stand for none, on all processes alike.
        entries, total: of part and whole.
        temperature: of the softmax.
        statistics: whether `others_max`, `dot`, `total` and `uncapped` are asked for. `total` comes back divided by
            the size of the vocabulary.
        group: name of the process group.
    """
    reference, rest, label, others_max, dot, sums, uncapped = state.unbind()
    highest = reduced(torch.stack([reference, others_max][: 1 + statistics]), "max", group)
    # A part without any other entry than the label, or of -inf alone, has the reference -inf and no sum.
    change = torch.where(reference == highest[0], 0, reference - highest[0])
    shrink = torch.exp(change / temperature)
    own = (labels >= 0) & (labels < entries)
    parts = [rest * shrink, torch.where(own, label, 0), own.to(rest.dtype)]
    # For the slope of softcapping at the label the part of the label needs no other.
    if statistics:
        dot = shrink * (dot + torch.where(rest == 0, 0, change * rest))
        parts += [dot, sums, torch.where(own, uncapped, 0)]
    rest, label, owners, *measured = reduced(torch.stack(parts), "sum", group)
    # None where it is out of range, or where processes have different ones.
    label = torch.where((owners == 1) | padding, label, math.nan)
    if statistics:
        dot, sums, uncapped = measured
        return torch.stack([highest[0], rest, label, highest[1], dot, sums / total, uncapped])
    return torch.stack([highest[0], rest, label, others_max, dot, sums, uncapped])


def merged_rows(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    measured: Tensor,
    how: Processing,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, maxima, log-sums and statistics of rows over the whole vocabulary, from those over its parts.

    Args:
        logits: [B, T_out, V] of the part.
        labels: [B, T_out], as of `Shard.own_labels`.
        logps, row_max, log_sum: [B, T_out] of the op logps_fwd on the part, with any label where it is elsewhere.
        measured: [3, B, T_out] likewise, or [0] if not asked for.
        how: what becomes of the logits.
        shard: the part.
    """
    statistics = measured.numel() > 0
    own = (labels >= 0) & (labels < shard.entries)
    place = labels.clamp(0, shard.entries - 1).unsqueeze(-1)
    x = torch.where(own, logits.gather(-1, place).squeeze(-1).to(logps.dtype), 0)  # of the label
    # Softcapping may round different ones to the same value, and top-1 hits go by what was before it.
    top_x = logits.amax(-1).to(row_max.dtype) if statistics and how.softcapping else row_max
    highest = reduced(torch.stack([row_max, top_x][: 1 + statistics]), "max", shard.group)
    multiplier = (how.softcapping or 1.0) / how.temperature
    change = torch.where(row_max == highest[0], 0, (row_max - highest[0]) * multiplier)
    distance = logps + log_sum + change  # of the label from the largest; exactly 0 where it is that
    if how.softcapping == 0.0:
        distance = torch.where(x == -math.inf, x - highest[0], distance)
    weight = torch.exp(log_sum + change)
    # Without 1 of the largest logit: where one entry has nearly all, the log-sum and log p are of what the others have.
    leads = row_max == highest[0]
    excess = torch.where(leads, torch.expm1(log_sum), weight)
    parts = [excess, torch.where(own, distance, 0), own.to(excess.dtype), leads.to(excess.dtype)]
    if statistics:
        spread = torch.where(weight == 0, 0, weight * (change + log_sum - measured[1]))
        parts += [measured[0] * shard.share, spread, x]
    excess, distance, owners, leading, *sums = reduced(torch.stack(parts), "sum", shard.group)
    excess = excess + (leading - 1)
    whole_log_sum = torch.log1p(excess)
    # A label that no part has, or two: it is out of range, or the processes have different ones.
    whole_log_sum = torch.where((owners == 1) & (highest[0] != math.inf), whole_log_sum, math.nan)
    scored = labels != IGNORED
    whole = torch.where(scored, distance - whole_log_sum, 0)
    if not statistics:
        return whole, highest[0], whole_log_sum, measured
    mean, spread, x = sums
    entropy = whole_log_sum - spread / (1 + excess)
    mean = torch.where(owners == 1, mean, math.nan)
    mean, entropy = (torch.where(scored, s, 0) for s in (mean, entropy))
    hit = (x >= highest[1]) & ~whole.isnan() & scored
    return whole, highest[0], whole_log_sum, torch.stack([mean, entropy, hit.to(mean.dtype)])


class _SumOverShards(torch.autograd.Function):
    """The sum over the processes, all of which go on with it alike: its gradient is each part's."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: str) -> Tensor:
        """The sum."""
        return reduced(values, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Handed on."""
        return grad, None


class ToShards(torch.autograd.Function):
    """What every process has alike, for computations that differ: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: str) -> Tensor:
        """The values."""
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The sum."""
        return reduced(grad, "sum", ctx.group), None


def eager_rows(
    capped: Tensor, uncapped: Tensor, labels: Tensor, temperature: float, shard: Shard
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Log-probs [B, T] and statistics in plain PyTorch, from the part of logits [B, T, V] after and before softcapping.

    Args:
        capped, uncapped: of the part, in at least fp32.
        labels: [B, T], as of `Shard.own_labels`.
        temperature: of the softmax.
        shard: the part.
    """
    scored, own = labels != IGNORED, (labels >= 0) & (labels < shard.entries)
    place = labels.clamp(0, shard.entries - 1).unsqueeze(-1)
    tops = torch.stack([capped.detach().amax(-1), uncapped.detach().amax(-1)])
    highest, top_x = reduced(tops, "max", shard.group)
    z = (capped - highest.unsqueeze(-1)) / temperature
    label = torch.where(own, z.gather(-1, place).squeeze(-1), 0)
    x = torch.where(own, uncapped.detach().gather(-1, place).squeeze(-1), 0)
    e = z.exp()
    spread = torch.where(e == 0, 0, e * z).detach().sum(-1)
    mean = (capped.detach() * (shard.share / shard.entries)).sum(-1) / temperature
    parts = torch.stack([e.sum(-1), label, own.to(z.dtype), x, spread, mean])
    total, label, owners, x, spread, mean = _SumOverShards.apply(parts, shard.group)
    logps = torch.where(scored, torch.where(owners == 1, label - total.log(), math.nan), 0)
    with torch.no_grad():
        entropy = total.log() - spread / total
        mean, entropy = (torch.where(scored, torch.where(owners == 1, s, math.nan), 0) for s in (mean, entropy))
        hit = (x >= top_x) & ~logps.isnan() & scored
    return logps, (mean, entropy, hit)
