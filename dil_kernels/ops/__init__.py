"""torch.library ops, their fake implementations and the autograd Functions around them."""

import torch


def refuse_double_backward(what: str) -> None:
    """Called in a backward: raise if a graph of it is being made, whose gradients would silently be missing.

    Raises:
        RuntimeError: the backward runs with create_graph=True.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{what} can be differentiated once; create_graph=True (a double backward) is not supported")
