"""The fused head inside the forward of a Hugging Face causal language model.

The model's own forward runs, down to the call of its output head. There, inside the head's own call, the log-probs of
the labels are taken instead of the logits. Whatever wrappers do around the model or the head (DDP's gradient
synchronisation, FSDP's and ZeRO-3's gathering of weights) therefore happens as it does for the logits.

What a model does to its logits after the head is measured, not looked up: at the installation its forward runs on five
tokens, with a stand-in for the body and known values for the logits. What comes out must be scale * x, or
cap * tanh(scale * x / cap); anything else is refused with the reason. No weight of body or head takes part, so they may
be sharded or on any device.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError(f"the fused head needs the extra [train]: pip install 'dil-kernels[train]' ({error})") from error

from dil_kernels.functional.linear import linear_token_logps

__all__ = [
    "FusedHead",
    "FusedHeadOutput",
    "UnsupportedHeadError",
    "fused_head_problem",
    "install_fused_head",
    "remove_fused_head",
]

TINY, HUGE = 2.0**-20, 2.0**20  # logits at which a softcap shows its slope, and its height
TOLERANCE = 1e-6  # relative; some models post-process in fp32


class UnsupportedHeadError(ValueError):
    """The fused head cannot compute this model's logits; the message is the reason."""


@dataclass
class FusedHeadOutput(ModelOutput):
    """What a model returns for `score_labels`; the statistics are None unless `return_statistics` was asked for."""

    token_logps: Tensor | None = None  # [B, T - 1], as of `linear_token_logps`
    mean_logit: Tensor | None = None  # as of `LogitStatistics`, shaped as token_logps; so the next two
    entropy: Tensor | None = None
    top1_hit: Tensor | None = None
    aux_loss: Tensor | None = None  # [] the model's own load-balancing loss, where it returns one


@dataclass(frozen=True)
class FusedHead:
    """An installed head; the model's logits are softcap(logit_scale * (W h + b))."""

    logit_scale: float
    final_logit_softcapping: float | None
    head: nn.Module  # the model's output embeddings
    original_forward: Callable[..., Any]  # of the model, bound


def install_fused_head(model: nn.Module) -> FusedHead:
    """Teach a causal language model to return log-probs in place of logits. Only this instance changes.

    Called as before, the model does what it did. With `score_labels` it returns a `FusedHeadOutput`:

        model(input_ids=ids, attention_mask=mask, score_labels=labels, score_options={"temperature": 0.7})

    - score_labels: [B, T] int64, shaped as the input; position t scores label t + 1, -100 is not scored. In packed
      input the first label of every sequence must be -100.
    - score_options: further keywords of `linear_token_logps`, other than those that describe the head.

    Call the model as it is wrapped (DDP, FSDP, DeepSpeed, torch.compile), but install before wrapping it. Deep copies
    are installed, too; checkpoints stay as they were. LoRA and `modules_to_save` on the head count if they are there
    at the installation; LoRA there costs a copy of the weight and its full gradient.

    Args:
        model: a `PreTrainedModel` with a language-modelling head, or a `PeftModel` around one.

    Raises:
        UnsupportedHeadError: this head cannot compute the model's logits; the message says why.
    """
    model = _unwrapped(model)
    remove_fused_head(model)
    fused = _examined(model)
    for site in _sites(fused.head):
        site.forward = MethodType(_head_forward, site)
    model._fused_head = fused  # type: ignore[assignment]
    model.forward = MethodType(_scoring_forward(fused.original_forward), model)
    return fused


def remove_fused_head(model: nn.Module) -> None:
    """Undo `install_fused_head`; a model without a fused head stays as it is."""
    model = _unwrapped(model)
    fused = model.__dict__.pop("_fused_head", None)
    if fused is None:
        return
    for site in _sites(fused.head):
        site.__dict__.pop("forward", None)
    model.__dict__.pop("forward", None)
    if fused.original_forward != model.forward:  # it had been replaced before the installation
        model.forward = fused.original_forward


def fused_head_problem(model: nn.Module) -> str | None:
    """Why `install_fused_head` would refuse the model; None if it would not."""
    model = _unwrapped(model)
    if "_fused_head" in model.__dict__:
        return None
    try:
        _examined(model)
    except UnsupportedHeadError as error:
        return str(error)
    return None


# What the forward of the model and the forward of its head say to each other.


class _Request:
    """What the head is to do in one call of the model, and its answer."""

    answer: Any = None
    stand_in: Tensor | None = None  # what the head returned to the model in place of logits

    def answered_by(self, site: nn.Module, hidden_states: Tensor) -> Tensor:
        """Answer, and return what stands in for the logits."""
        if self.answer is not None:
            raise UnsupportedHeadError("its forward calls the output head more than once")
        self.answer, stand_in = self._answer(site, hidden_states)
        return stand_in

    def _answer(self, site: nn.Module, hidden_states: Tensor) -> tuple[Any, Tensor]:
        raise NotImplementedError


class _Scoring(_Request):
    def __init__(self, fused: FusedHead, labels: Tensor, options: dict[str, Any]) -> None:
        self.fused, self.labels, self.options = fused, labels, options

    def _answer(self, site: nn.Module, hidden_states: Tensor) -> tuple[Any, Tensor]:
        if hidden_states.ndim != 3 or hidden_states.shape[:2] != self.labels.shape:
            raise ValueError(
                f"score_labels must be {list(hidden_states.shape[:-1])} as the hidden states at the output head, got "
                f"{list(self.labels.shape)}; neither logits_to_keep nor the virtual tokens of prompt tuning fit"
            )
        hidden_states, weight, bias = _operands(site, hidden_states)
        answer = linear_token_logps(
            hidden_states,
            weight,
            self.labels,
            lm_head_bias=bias,
            logit_scale=self.fused.logit_scale,
            final_logit_softcapping=self.fused.final_logit_softcapping,
            **self.options,
        )
        token_logps, statistics = answer if isinstance(answer, tuple) else (answer, (None, None, None))
        if torch.compiler.is_compiling():  # a CPU tensor would keep a compiled model out of CUDA graphs
            stand_in = hidden_states.new_empty(hidden_states.shape[0], 0, weight.shape[0])
        else:
            stand_in = self.stand_in = torch.tensor([[[-HUGE, -1.0, TINY, 30.0]]], dtype=torch.float64)
        return (token_logps, *statistics), _StandIn.apply(stand_in, token_logps)


# Wrappers of the head hang what must happen before its backward, such as gathering its weight, on the tensor that the
# head returns. So the gradient of the log-probs also takes the way that it would take through the logits, as zeros.


class _StandIn(torch.autograd.Function):
    """`stand_in` as a function of the log-probs."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, token_logps: Tensor) -> Tensor:
        """The stand-in."""
        ctx.like = token_logps.new_empty(0), token_logps.shape
        return stand_in.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor]:
        """Nothing, in the shape of the log-probs."""
        like, shape = ctx.like
        return None, like.new_zeros(shape)


class _After(torch.autograd.Function):
    """The log-probs as a function of what became of the stand-in."""

    @staticmethod
    def forward(ctx: Any, token_logps: Tensor, logits: Tensor) -> Tensor:
        """The log-probs."""
        ctx.logits = logits.new_empty(0), logits.shape
        return token_logps.clone()  # a view makes FSDP warn of in-place changes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Their gradient, and nothing in the shape of the logits."""
        like, shape = ctx.logits
        return grad, like.new_zeros(shape)


class _Measurement(_Request):
    def __init__(self, logits: Tensor) -> None:
        self.stand_in = logits

    def _answer(self, site: nn.Module, hidden_states: Tensor) -> tuple[Any, Tensor]:
        assert self.stand_in is not None
        wanted = (*self.stand_in.shape[:2], site.in_features)
        if tuple(hidden_states.shape) != wanted:
            raise UnsupportedHeadError(f"its head gets {list(hidden_states.shape)} for tokens of {list(wanted)}")
        return True, self.stand_in


def _call(forward: Callable[..., Any], args: Any, kwargs: dict[str, Any], sites: list[nn.Module], ask: _Request) -> Any:
    """What `forward` returns when the head, one of `sites`, answers `ask`."""
    for site in sites:
        site._fused_head_request = ask  # type: ignore[assignment]
    try:
        output = forward(*args, **kwargs)
    finally:
        for site in sites:
            del site._fused_head_request
    if ask.answer is None:
        raise UnsupportedHeadError("its forward does not call the head that get_output_embeddings() returns")
    return output


def _keywords(forward: Callable[..., Any]) -> dict[str, Any]:
    """Those of `forward` that ask for an output by name, and for no cache."""
    parameters = inspect.signature(forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    wanted = {"return_dict": True, "use_cache": False}
    return {name: value for name, value in wanted.items() if open_ended or name in parameters}


def _head_forward(site: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of an installed head."""
    request = site.__dict__.get("_fused_head_request")
    if request is None:
        return type(site).forward(site, hidden_states, *args, **kwargs)
    return request.answered_by(site, hidden_states, *args, **kwargs)


def _scoring_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of an installed model, under the signature of `original`, which trainers and `generate` inspect."""
    keywords = _keywords(original)

    @functools.wraps(original)
    def forward(
        self: Any,
        *args: Any,
        score_labels: Tensor | None = None,
        score_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        fused: FusedHead = self._fused_head
        if score_labels is None:
            return fused.original_forward(*args, **kwargs)
        if kwargs.get("labels") is not None:
            raise ValueError("labels and score_labels exclude each other: the model's own loss needs the logits")
        head = self.get_output_embeddings()
        if getattr(head, "_fsdp_wrapped_module", head) is not fused.head:
            raise RuntimeError(
                "the model's output head was replaced after the fused one was installed; install it again"
            )
        ask = _Scoring(fused, score_labels, score_options or {})
        output = _call(fused.original_forward, args, {**kwargs, **keywords}, _sites(fused.head), ask)
        if ask.stand_in is not None:
            _check_unchanged(fused, ask.stand_in, output.logits)
        token_logps, mean_logit, entropy, top1_hit = ask.answer
        token_logps = _After.apply(token_logps, output.logits)
        return FusedHeadOutput(token_logps, mean_logit, entropy, top1_hit, getattr(output, "aux_loss", None))

    signature = inspect.signature(original)
    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [receiver, *signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def _check_unchanged(fused: FusedHead, stand_in: Tensor, logits: Tensor) -> None:
    """A config that changed after the installation; on the CPU, so that no device is waited for."""
    wanted = _post_processed(stand_in, fused.logit_scale, fused.final_logit_softcapping)
    if logits.device.type == "cpu" and not torch.allclose(logits.double(), wanted, rtol=TOLERANCE, atol=0.0):
        raise RuntimeError(
            "what the model does to its logits changed after the fused head was installed; install it again"
        )


# Which modules the head is made of, and its weight; the only part that knows PEFT.


def _unwrapped(model: Any) -> nn.Module:
    return model.get_base_model() if _is(model, "peft.peft_model", "PeftModel") else model


def _is(module: nn.Module, library: str, name: str) -> bool:
    """Whether the module is of a class of a library that may not be imported."""
    return library in sys.modules and isinstance(module, getattr(sys.modules[library], name))


def _is_lora(module: nn.Module) -> bool:
    return _is(module, "peft.tuners.lora.layer", "Linear")


def _sites(head: Any) -> list[nn.Module]:
    """The modules of which one is called for the logits."""
    if _is(head, "peft.utils.other", "ModulesToSaveWrapper"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


def _site_problem(site: Any) -> str | None:
    linear: Any = site.base_layer if _is_lora(site) else site
    if type(linear).forward is not nn.Linear.forward:
        return f"its output head is a {type(linear).__name__}, not an nn.Linear"
    replacements = [module.forward for module in (site, linear) if "forward" in module.__dict__]
    if any(getattr(forward, "__func__", None) is not _head_forward for forward in replacements):
        return "the forward of its output head was replaced (by device_map, or another library)"
    if not linear.weight.is_floating_point():
        return f"the weight of its output head is {linear.weight.dtype}"
    if _is_lora(site) and (site.lora_variant or any(lora.bias is not None for lora in site.lora_B.values())):
        return "its output head has an adapter other than plain LoRA"
    return None


def _operands(site: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states [B, T, D], weight [V, D] and bias of the product that the head is."""
    linear = site.base_layer if _is_lora(site) else site
    weight = linear.weight
    if type(weight) not in (Tensor, nn.Parameter):
        raise UnsupportedHeadError(f"the weight of the output head is a {type(weight).__name__}, split over devices")
    if not _is_lora(site):
        return hidden_states, weight, linear.bias
    if site.merged and site.disable_adapters:
        site.unmerge()
    adapters = [] if site.merged or site.disable_adapters else [a for a in site.active_adapters if a in site.lora_A]
    # W h + s B (A h) is one product of [W, s B] and [h, A h].
    inputs, weights = [hidden_states], [weight]
    for name in adapters:
        lora_A, lora_B, dropout = site.lora_A[name], site.lora_B[name], site.lora_dropout[name]
        inputs.append(lora_A(dropout(hidden_states.to(lora_A.weight.dtype))).to(hidden_states.dtype))
        weights.append((lora_B.weight * site.scaling[name]).to(weight.dtype))
    if not adapters:
        return hidden_states, weight, linear.bias
    return torch.cat(inputs, dim=-1), torch.cat(weights, dim=-1), linear.bias


# The examination of a model.


@dataclass
class _BodyOutput(BaseModelOutputWithPast):
    """The stand-in for what a body returns: whatever else a model asks of it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _examined(model: nn.Module) -> FusedHead:
    """The fused head for the model.

    Raises:
        UnsupportedHeadError: there is none.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedHeadError(f"{name} is not a PreTrainedModel; install the fused head before a model is wrapped")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedHeadError(f"{name} is an encoder-decoder model")
    head = model.get_output_embeddings()
    if head is None or not model.can_generate():
        raise UnsupportedHeadError(f"{name} is not a causal language model")
    for problem in filter(None, map(_site_problem, _sites(head))):
        raise UnsupportedHeadError(f"{name}: {problem}")
    try:
        scale, cap = _measure(model, head)
    except UnsupportedHeadError as error:
        raise UnsupportedHeadError(f"{name}: {error}") from error
    return FusedHead(scale, cap, head, model.forward)


def _measure(model: PreTrainedModel, head: nn.Module) -> tuple[float, float | None]:
    """The scale and the softcap that the model's forward applies to the logits of its head."""
    sites = _sites(head)
    site: Any = sites[0]
    D, V, parameter = site.in_features, site.out_features, next(head.parameters())
    ramp, ones = torch.linspace(-60.0, 60.0, V, dtype=torch.float64), torch.ones(V, dtype=torch.float64)
    given = torch.stack([ramp, ramp.flip(0), TINY * ones, HUGE * ones, -HUGE * ones]).unsqueeze(0)  # [1, 5, V]
    tokens = torch.zeros(given.shape[:2], device=parameter.device, dtype=torch.int64)
    body_output = _BodyOutput(torch.zeros(*tokens.shape, D, device=parameter.device, dtype=parameter.dtype))
    bodies = {body for body in (model.base_model, model.get_decoder()) if body is not model}
    stand_ins = {body: lambda *args, **kwargs: body_output for body in bodies}
    stand_ins |= {site: MethodType(_head_forward, site) for site in sites}
    replaced = {module: module.__dict__.get("forward") for module in stand_ins}
    forward = model.forward
    try:
        for module, stand_in in stand_ins.items():
            module.forward = stand_in
        with torch.enable_grad():
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **_keywords(forward)}
            seen = _call(forward, (), inputs, sites, _Measurement(given)).logits
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


def _read_off(given: Tensor, seen: Tensor) -> tuple[float, float | None]:
    """The scale and the softcap that turn the logits `given` [1, 5, V] of `_measure` into `seen`."""
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
