"""What the forward of a model and the forward of its output head say to each other.

They are far apart: in between lies the model's own code, which knows nothing of it. Each call leaves its request where
only the thread that makes it looks; on the modules, which threads share, nothing is written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = ["Request", "UnsupportedHeadError", "answering_forward", "ask", "is_answering", "replaced_forward"]


class UnsupportedHeadError(ValueError):
    """The fused head cannot compute this model's logits; the message is the reason."""


class Request:
    """What one of `sites`, the modules that the head is made of, is to do in one call of the model, and its answer."""

    answer: Any = None
    stand_in: Tensor | None = None  # what the head returned to the model in place of logits

    def __init__(self, sites: Sequence[nn.Module]) -> None:
        self.sites = sites

    def answered_by(self, site: nn.Module, hidden_states: Tensor) -> Tensor:
        """Answer, and return what stands in for the logits."""
        if self.answer is not None:
            raise UnsupportedHeadError("its forward calls the output head more than once")
        self.answer, self.stand_in = self._answer(site, hidden_states)
        return self.stand_in

    def _answer(self, site: nn.Module, hidden_states: Tensor) -> tuple[Any, Tensor]:
        raise NotImplementedError


class _Channel(threading.local):  # torch.compile traces it, but no contextvars.ContextVar
    def __init__(self) -> None:
        self.request: Request | None = None


_channel = _Channel()


def ask(request: Request | None, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """What `forward` returns when the head answers the request; with None the head computes logits.

    Raises:
        UnsupportedHeadError: the head was not called.
    """
    before = _channel.request
    if request is None and before is None:
        return forward(*args, **kwargs)
    _channel.request = request
    try:
        output = forward(*args, **kwargs)
    finally:
        _channel.request = before
    if request is not None and request.answer is None:
        raise UnsupportedHeadError("its forward does not call the head that get_output_embeddings() returns")
    return output


def answering_forward(site: nn.Module) -> Callable[..., Tensor]:
    """A forward for the module, which can be pickled and copied with it.

    Without a request it does what the one does that the module may have had in place of that of its class.
    """
    return partial(_forward, site, as_before=replaced_forward(site))


def replaced_forward(site: nn.Module) -> Callable[..., Any] | None:
    """The forward that a module has in place of that of its class, or had before `answering_forward`."""
    forward: Any = site.__dict__.get("forward")
    return forward.keywords["as_before"] if is_answering(forward) else forward


def is_answering(forward: Any) -> bool:
    """Whether it is of `answering_forward`."""
    return getattr(forward, "func", None) is _forward


def _forward(
    site: nn.Module, hidden_states: Tensor, *args: Any, as_before: Callable[..., Any] | None = None, **kwargs: Any
) -> Tensor:
    request = _channel.request
    if request is None or all(site is not other for other in request.sites):
        if as_before is not None:
            return as_before(hidden_states, *args, **kwargs)
        return type(site).forward(site, hidden_states, *args, **kwargs)
    if args or kwargs:
        more = ", ".join([*kwargs, *["another tensor"] * len(args)])
        raise UnsupportedHeadError(f"its output head is called with {more} beside the hidden states")
    return request.answered_by(site, hidden_states)
