"""Every loss by its name."""

from __future__ import annotations

from dil_kernels.losses.divergence import Divergence
from dil_kernels.losses.validation import check_divergence

_REGISTRY: dict[str, Divergence] = {}


def divergence_names() -> list[str]:
    """Every ``loss_type`` that exists, in the order of registration."""
    return list(_REGISTRY)


def get_divergence(loss_type: str) -> Divergence:
    """The divergence registered under ``loss_type``; a ``ValueError`` that lists what exists otherwise."""
    try:
        return _REGISTRY[loss_type]
    except (KeyError, TypeError):
        raise ValueError(f"unknown loss_type {loss_type!r}; available: {', '.join(_REGISTRY)}") from None


def register_divergence(divergence: Divergence) -> Divergence:
    """Make a loss available by name wherever a ``loss_type`` is taken.

    A separable Bregman divergence is checked on a grid of log ratios in fp64: ``A'(u) > 0`` (``h`` strictly convex),
    ``P'(u) = e^u A'(u)``, ``dA`` and ``dP``, where given, against autograd, and ``log_A``, ``log_P`` and ``log_dP``
    against what they are the logarithms of. Everything returns a tensor of the shape of its argument; nothing may
    change that, nor jump on [-8, 8]. The terms of an ``h`` may cancel in fp64: a warning names the log ratios where
    they do not, if those do not cover [-40, 40].
    Of A and P with ``bregman=False`` only ``dA`` and ``dP`` are checked; a coupled loss is checked to be elementwise.
    The compiled kernels sum log ratios for it; its own math runs in torch on those, a number a sequence.

    Args:
        divergence: the loss; its name must be new.

    Returns:
        The same divergence.

    Raises:
        TypeError: it is no `Divergence`.
        ValueError: the name is taken, or the check fails; an ``h`` must hold on [-8, 8] at least.
    """
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence must be a Divergence, got {type(divergence).__name__}")
    if divergence.name in _REGISTRY or divergence.name == "none":
        raise ValueError(f"divergence {divergence.name!r} is already registered")
    check_divergence(divergence)
    _REGISTRY[divergence.name] = divergence
    return divergence
