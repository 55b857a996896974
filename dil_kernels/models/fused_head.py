"""The fused head inside the forward of a Hugging Face causal language model.

The model's own forward runs, down to the call of its output head. There, inside the head's own call, the log-probs of
the labels are taken instead of the logits. Whatever wrappers do around the model or the head (DDP's gradient
synchronisation, FSDP's and ZeRO-3's gathering of weights) therefore happens as it does for the logits.

What the head computes, and what the model does to the logits after it, may change after the installation: adapters,
weights, the config. Both are looked at in every call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dil_kernels.wording import needs_extra

try:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError(needs_extra("the fused head", "train", error)) from error

from dil_kernels.functional.linear import linear_token_logps
from dil_kernels.models.head_operands import operands, site_problem, sites_of, unwrapped
from dil_kernels.models.head_requests import (
    Request,
    UnsupportedHeadError,
    answering_forward,
    ask,
    replaced_forward,
)
from dil_kernels.models.logit_processing import check_unchanged, known_logits, measure, output_keywords

__all__ = [
    "FusedHead",
    "FusedHeadOutput",
    "UnsupportedHeadError",
    "fused_head_problem",
    "install_fused_head",
    "install_fused_heads",
    "remove_fused_head",
]

# Those keywords of `linear_token_logps` that describe neither the head nor the shape of what comes back.
SCORE_OPTIONS = ("temperature", "ignore_index", "stash_bytes", "max_scored_tokens", "return_statistics", "backend")


@dataclass
class FusedHeadOutput(ModelOutput):
    """What a model returns for `score_labels`; the statistics are None unless `return_statistics` was asked for."""

    token_logps: Tensor | None = None  #: [B, T - 1], as of `linear_token_logps`
    mean_logit: Tensor | None = None  #: as of `LogitStatistics`, shaped as token_logps
    entropy: Tensor | None = None  #: likewise
    top1_hit: Tensor | None = None  #: likewise
    aux_loss: Tensor | None = None  #: [] the model's own load-balancing loss, where it returns one
    hidden_states: tuple[Tensor, ...] | None = None  #: as the model returns them for `output_hidden_states`
    attentions: tuple[Tensor, ...] | None = None  #: likewise for `output_attentions`


@dataclass(frozen=True)
class FusedHead:
    """An installed head; the model's logits are softcap(logit_scale * (W h + b))."""

    logit_scale: float
    final_logit_softcapping: float | None
    head: nn.Module  #: the model's output embeddings
    replaced_forward: Callable[..., Any] | None  #: of the model, if it was not that of its class


def install_fused_head(model: nn.Module) -> FusedHead:
    """Teach a causal language model to return log-probs in place of logits. Only this instance changes.

    Called as before, the model does what it did. With `score_labels` it returns a `FusedHeadOutput`:

        model(input_ids=ids, attention_mask=mask, score_labels=labels, score_options={"temperature": 0.7})

    - score_labels: [B, T] int64, shaped as the input; position t scores label t + 1, -100 is not scored. In packed
      input the first label of every sequence must be -100.
    - score_options: further keywords of `linear_token_logps`, other than those that describe the head, and shift.
    - whatever `use_cache` and `return_dict` say, there is no cache.

    Call the model as it is wrapped (DDP, FSDP, DeepSpeed, torch.compile), but install before wrapping it. Copies,
    pickled ones too, are installed as well; checkpoints stay as they were. LoRA and `modules_to_save` on the head
    count as they are at the call; LoRA there costs a copy of the weight and its full gradient. Threads may score,
    generate and call the model at the same time. A head that is split over processes (`tp_plan="auto"`) stays split:
    each computes its part of the vocabulary.

    Where the head has become one that cannot be fused (an adapter other than plain LoRA was activated, say), scoring
    raises an `UnsupportedHeadError`, and a `RuntimeError` where the model has got another head or does something else
    to its logits: install again then. In a compiled model on a GPU the last is an assertion that fails on the device.

    Args:
        model: a `PreTrainedModel` with a language-modelling head, or a `PeftModel` around one.

    Raises:
        UnsupportedHeadError: this head cannot compute the model's logits; the message says why.
    """
    model = unwrapped(model)
    remove_fused_head(model)
    fused = _examined(model)
    for site in sites_of(fused.head):
        site.forward = answering_forward(site)
    model._fused_head = fused  # type: ignore[assignment]
    model.forward = _ScoringForward(model, output_keywords(_own_forward(model)))
    return fused


def remove_fused_head(model: nn.Module) -> None:
    """Undo `install_fused_head`; a model without a fused head stays as it is."""
    model = unwrapped(model)
    fused = model.__dict__.pop("_fused_head", None)
    if fused is None:
        return
    for site in sites_of(fused.head):
        before = replaced_forward(site)
        site.__dict__.pop("forward", None)
        if before is not None:
            site.forward = before
    model.__dict__.pop("forward", None)
    if fused.replaced_forward is not None:
        model.forward = fused.replaced_forward


def fused_head_problem(model: nn.Module) -> str | None:
    """Why `install_fused_head` would refuse the model as it is now; None if it would not."""
    try:
        _examined(unwrapped(model))
    except UnsupportedHeadError as error:
        return str(error)
    return None


def install_fused_heads(models: Sequence[nn.Module], wanted: bool | None) -> str | None:
    """Install the fused head in all of some models, where that is wanted and possible, or in none of them.

    Args:
        models: not yet wrapped.
        wanted: where it is possible if None; true for an error where it is not.

    Returns:
        Why it is in none; None if it is in all.

    Raises:
        UnsupportedHeadError: it was wanted, but is not possible.
    """
    problem: str | None = "fused_head=False was given"
    if wanted is not False:
        problem = next(filter(None, map(fused_head_problem, models)), None)
    if problem is not None and wanted:
        raise UnsupportedHeadError(f"fused_head=True was given, but {problem}")
    for model in models if problem is None else ():
        install_fused_head(model)
    return problem


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
    for problem in filter(None, map(site_problem, sites_of(head))):
        raise UnsupportedHeadError(f"{name}: {problem}")
    own_forward = _own_forward(model)
    try:
        scale, cap = measure(model, own_forward, head)
    except UnsupportedHeadError as error:
        raise UnsupportedHeadError(f"{name}: {error}") from error
    replaced = own_forward != type(model).forward.__get__(model)
    return FusedHead(scale, cap, head, own_forward if replaced else None)


def _own_forward(model: Any) -> Callable[..., Any]:
    """The forward that the model has, or had before the installation."""
    fused: FusedHead | None = model.__dict__.get("_fused_head")
    if fused is None:
        return model.forward
    return partial(type(model).forward, model) if fused.replaced_forward is None else fused.replaced_forward


class _ScoringForward:
    """The forward of an installed model. Of the attributes of a method it has those that wrappers go by."""

    def __init__(self, model: nn.Module, keywords: dict[str, Any]) -> None:
        self.__self__, self.keywords = model, keywords

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _forward(self.__self__, self.keywords, *args, **kwargs)

    @property
    def __func__(self) -> Callable[..., Any]:
        """For wrappers that bind it to a copy of the model."""
        keywords = self.keywords

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _forward(self, keywords, *args, **kwargs)

        receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [receiver, *self.__signature__.parameters.values()]
        forward.__signature__ = self.__signature__.replace(parameters=parameters)  # type: ignore[attr-defined]
        return forward

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own forward, which trainers and `generate` inspect."""
        return inspect.signature(_own_forward(self.__self__))


def _forward(
    model: Any,
    keywords: dict[str, Any],
    *args: Any,
    score_labels: Tensor | None = None,
    score_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """The model's own forward, or with `score_labels` a `FusedHeadOutput`."""
    own_forward = _own_forward(model)
    if score_labels is None:
        if score_options:
            raise TypeError(f"score_options={score_options} was given, but no score_labels")
        return ask(None, own_forward, args, kwargs)
    if kwargs.get("labels") is not None:
        raise ValueError("labels and score_labels exclude each other: the model's own loss needs the logits")
    for option in score_options or {}:
        if option not in SCORE_OPTIONS:
            raise TypeError(f"score_options must be among {', '.join(SCORE_OPTIONS)}, got {option!r}")
    fused: FusedHead = model._fused_head
    head, sites = model.get_output_embeddings(), sites_of(fused.head)
    if getattr(head, "_fsdp_wrapped_module", head) is not fused.head:
        raise RuntimeError("the model's output head was replaced after the fused one was installed; install it again")
    request = _Scoring(sites, fused, score_labels, score_options or {})
    output = ask(request, own_forward, args, {**kwargs, **keywords})
    assert request.known is not None
    check_unchanged(request.known, output.logits, fused.logit_scale, fused.final_logit_softcapping)
    token_logps, mean_logit, entropy, top1_hit = request.answer
    token_logps = _After.apply(token_logps, output.logits)
    others = {name: getattr(output, name, None) for name in ("aux_loss", "hidden_states", "attentions")}
    return FusedHeadOutput(token_logps, mean_logit, entropy, top1_hit, **others)


class _Scoring(Request):
    known: Tensor | None = None

    def __init__(self, sites: list[nn.Module], fused: FusedHead, labels: Tensor, options: dict[str, Any]) -> None:
        super().__init__(sites)
        self.fused, self.labels, self.options = fused, labels, dict(options)
        most = self.options.pop("max_scored_tokens", None)
        # As a size: where the graph breaks in the model, torch.compile would compile the head anew for each int.
        self.most = None if most is None else labels.new_empty(most, 0)

    def _answer(self, site: nn.Module, hidden_states: Tensor) -> tuple[Any, Tensor]:
        if hidden_states.ndim != 3 or hidden_states.shape[:2] != self.labels.shape:
            raise ValueError(
                f"score_labels must be {list(hidden_states.shape[:-1])} as the hidden states at the output head, got "
                f"{list(self.labels.shape)}; neither logits_to_keep nor the virtual tokens of prompt tuning fit, nor "
                "adapter_names where an adapter has a head of its own"
            )
        hidden_states, weight, bias = operands(site, hidden_states)
        answer = linear_token_logps(
            hidden_states,
            weight,
            self.labels,
            lm_head_bias=bias,
            logit_scale=self.fused.logit_scale,
            final_logit_softcapping=self.fused.final_logit_softcapping,
            max_scored_tokens=None if self.most is None else self.most.shape[0],
            **self.options,
        )
        token_logps, statistics = answer if isinstance(answer, tuple) else (answer, (None, None, None))
        self.known = known_logits(hidden_states)
        return (token_logps, *statistics), _StandIn.apply(self.known, token_logps)


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
