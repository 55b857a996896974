"""What a model does to the logits of its head: measured, not looked up, and looked at again in every call.

At the installation the model's forward runs on five tokens, with a stand-in for the body and known values for the
logits. What comes out must be scale * x, or cap * tanh(scale * x / cap); anything else is refused with the reason. No
weight of body or head takes part, so they may be sharded or on any device. In a call that scores, the head returns four
values to the model, and what the model makes of them must be what was measured.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dil_kernels.models.head_operands import head_sizes, is_of_fsdp2, sites_of
from dil_kernels.models.head_requests import Request, UnsupportedHeadError, answering_forward, ask

__all__ = ["check_unchanged", "known_logits", "measure", "output_keywords"]

TINY, HUGE = 2.0**-20, 2.0**20  # logits at which a softcap shows its slope, and its height
KNOWN = (-HUGE, -1.0, TINY, 30.0)  # in a call that scores
TOLERANCE = 1e-6  # relative; some models post-process in fp32
CHANGED = "what the model does to its logits changed after the fused head was installed; install it again"


class _Measurement(Request):
    def __init__(self, sites: list[nn.Module], logits: Tensor, hidden_size: int) -> None:
        super().__init__(sites)
        self.logits = logits
        self.wanted = (*logits.shape[:2], hidden_size)

    def _answer(self, site: Any, hidden_states: Tensor) -> tuple[Any, Tensor]:
        if tuple(hidden_states.shape) != self.wanted:
            raise UnsupportedHeadError(f"its head gets {list(hidden_states.shape)} for tokens of {list(self.wanted)}")
        return True, self.logits


@dataclass
class _BodyOutput(BaseModelOutputWithPast):
    """The stand-in for what a body returns: whatever else a model asks of it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def output_keywords(forward: Callable[..., Any]) -> dict[str, Any]:
    """Those of `forward` that ask for an output by name, and for no cache."""
    parameters = inspect.signature(forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    wanted = {"return_dict": True, "use_cache": False}
    return {name: value for name, value in wanted.items() if open_ended or name in parameters}


def measure(model: PreTrainedModel, forward: Callable[..., Any], head: nn.Module) -> tuple[float, float | None]:
    """The scale and the softcap that the model's `forward` applies to the logits of its head.

    Raises:
        UnsupportedHeadError: it does anything else, or could not be followed.
    """
    sites = sites_of(head)
    sizes, parameter = head_sizes(sites[0]), next(head.parameters())
    assert sizes is not None, "it is linear"
    V, D = sizes
    ramp, ones = torch.linspace(-60.0, 60.0, V, dtype=torch.float64), torch.ones(V, dtype=torch.float64)
    given = torch.stack([ramp, ramp.flip(0), TINY * ones, HUGE * ones, -HUGE * ones]).unsqueeze(0)  # [1, 5, V]
    tokens = torch.zeros(given.shape[:2], device=parameter.device, dtype=torch.int64)
    body_output = _BodyOutput(torch.zeros(*tokens.shape, D, device=parameter.device, dtype=parameter.dtype))
    bodies = {body for body in (model.base_model, model.get_decoder()) if body is not model}
    stand_ins: dict[nn.Module, Callable[..., Any]] = {body: lambda *args, **kwargs: body_output for body in bodies}
    stand_ins |= {site: answering_forward(site) for site in sites}
    replaced = {module: module.__dict__.get("forward") for module in stand_ins}
    unhooked = contextlib.ExitStack()
    try:
        for module, stand_in in stand_ins.items():
            module.forward = stand_in
            unhooked.enter_context(_without_sharding(module))
        with unhooked, torch.enable_grad():
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **output_keywords(forward)}
            seen = ask(_Measurement(sites, given, D), forward, (), inputs).logits
    except UnsupportedHeadError:
        raise
    except Exception as error:  # whatever a model's own code may raise
        raise UnsupportedHeadError(f"its forward could not be followed to the logits: {error}") from error
    finally:
        for module, before in replaced.items():
            del module.forward
            if before is not None:
                module.forward = before
    return _read_off(given, seen)


@contextlib.contextmanager
def _without_sharding(module: nn.Module) -> Iterator[None]:
    """While this is entered, a module that FSDP2 has can be called alone, without its hooks, which gather weights."""
    names = ("_forward_pre_hooks", "_forward_hooks") if is_of_fsdp2(module) else ()
    hooks = {name: getattr(module, name) for name in names}
    try:
        for name in names:
            setattr(module, name, OrderedDict())
        yield
    finally:
        for name, value in hooks.items():
            setattr(module, name, value)


def _read_off(given: Tensor, seen: Tensor) -> tuple[float, float | None]:
    """The scale and the softcap that turn the logits `given` [1, 5, V] of `measure` into `seen`."""
    if seen.shape != given.shape:
        raise UnsupportedHeadError(f"it turns logits {list(given.shape)} into {list(seen.shape)}")
    if seen.requires_grad:
        raise UnsupportedHeadError("it post-processes its logits with trainable parameters")
    seen = seen.cpu().double()
    # 12 digits: a slope cannot be read more exactly than tanh is computed.
    scale, height = float(f"{seen[0, 2, 0] / TINY:.12g}"), float(f"{seen[0, 3, 0]:.12g}")
    cap = None if abs(height - scale * HUGE) <= TOLERANCE * abs(height) else height
    wrong = ~torch.isclose(seen, _post_processed(given, scale, cap), rtol=TOLERANCE, atol=0.0)
    if wrong.any() or not scale > 0:
        x, y = (tensor[wrong][0].item() if wrong.any() else tensor[0, 2, 0].item() for tensor in (given, seen))
        raise UnsupportedHeadError(f"it does more to its logits than to scale or softcap them: {x:g} becomes {y:g}")
    return scale, cap


def _post_processed(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    return logits * scale if cap is None else cap * torch.tanh(logits * scale / cap)


def known_logits(like: Tensor) -> Tensor:
    """What the head returns in a call that scores, [1, 1, 4] fp64; on the CPU, so that no device is waited for."""
    if torch.compiler.is_compiling():  # a CPU tensor would keep a compiled model out of CUDA graphs
        values = [like.new_full((1, 1, 1), value, dtype=torch.float64) for value in KNOWN]
        return torch.cat(values, dim=-1)
    return torch.tensor([[KNOWN]], dtype=torch.float64)


def check_unchanged(given: Tensor, seen: Tensor, scale: float, cap: float | None) -> None:
    """Check that the model still turns logits into softcap(scale * x).

    Args:
        given: of `known_logits`.
        seen: what the model made of it.

    Raises:
        RuntimeError: it does not; on another device than the CPU, where that fails.
    """
    if seen.shape != given.shape:
        raise RuntimeError(CHANGED)
    seen = seen.detach().double()
    wanted = _post_processed(given.to(seen.device), scale, cap)
    same = torch.isclose(seen, wanted, rtol=TOLERANCE, atol=0.0).all()
    if torch.compiler.is_compiling() or same.device.type != "cpu":
        torch._assert_async(same, CHANGED)
    elif not same:
        raise RuntimeError(CHANGED)
