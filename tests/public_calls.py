"""Every public function on tensors, in every way in which it takes them: small calls that tests change one thing of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import dil_kernels
from dil_kernels.losses.tabular import tabular_policy
from dil_kernels.models.reward import density_ratio_reward_loss

IGNORE = -100
LOGITS = {"temperature": (1.0, 0.7, 1.3), "final_logit_softcapping": (9.0, 7.5, 20.0), "ignore_index": (-100, -7, -9)}
HEAD = LOGITS | {"logit_scale": (1.0, 0.5, 1.5), "stash_bytes": (0, 1 << 20, 512), "max_scored_tokens": (99, 80, 90)}
WEIGHTS = {"chosen_weight": (1.0, 0.5, 2.0), "rejected_weight": (1.0, 2.0, 0.5)}
AFFINE = {"beta": (1.0, 0.5, 2.0), "offset": (0.1, -0.2, 0.3)}
LOSS = WEIGHTS | AFFINE | {"alpha": (0.25, 0.5, 0.75), "max_log_ratio": (3.0, 5.0, 2.0)}
POWER = LOSS | {"power": (0.5, 1.5, -0.5)}
NLL = {"nll_weight": (0.1, 0.3, 0.2)}
NON_NEGATIVE = LOSS | {"non_negative": (0.9, 0.8, 0.7)}
BETA = {"beta": (0.1, 0.5, 0.2)}
DPO = BETA | NLL | {"label_smoothing": (0.1, 0.2, 0.3)}
RATIO = BETA | {"scale": (1.0, 4.0, 2.0)}


@dataclass(frozen=True)
class Call:
    """A public function with some of its tensors and options."""

    function: Callable[..., Any]
    how: str
    make: Callable[[int], dict[str, Tensor]]  # the tensors by name, of a size that grows with the argument
    gradients: tuple[str, ...]  # the names of those that get one
    fixed: dict[str, Any]
    varying: dict[str, tuple[Any, Any, Any]]  # options with the values of three calls

    def __str__(self) -> str:
        return f"{self.function.__name__}-{self.how}"

    @property
    def backends(self) -> tuple[str, ...]:
        """What its argument `backend` is tried with."""
        if "logits" in self.gradients or "hidden_states" in self.gradients:
            return "cpp", "triton", "eager"
        return () if self.function is tabular_policy else ("auto", "eager")

    def options(self, turn: int) -> dict[str, Any]:
        """The options of one of three calls."""
        return self.fixed | {name: values[turn] for name, values in self.varying.items()}

    def inputs(self, size: int, turn: int = 0) -> dict[str, Tensor]:
        """The tensors, with the labels that the options of this call ignore."""
        tensors = self.make(size)
        if "labels" in tensors:
            labels = tensors["labels"]
            tensors["labels"] = labels.masked_fill(labels == IGNORE, self.options(turn).get("ignore_index", IGNORE))
        return {name: x.requires_grad_() if name in self.gradients else x for name, x in tensors.items()}

    def run(self, tensors: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
        """Every tensor of the result."""
        return tree_leaves(self.function(**tensors, **options))


def _tokens(size: int, *, packed: bool) -> tuple[torch.Generator, tuple[int, ...], dict[str, Tensor]]:
    """Labels of an even number of sequences, some ignored; packed ones are of several lengths, 0 among them."""
    gen = torch.Generator().manual_seed(size)
    S = 2 * (size // 2)
    shape = (S * size,) if packed else (S, size)
    labels = torch.randint(0, 15 + size, shape, generator=gen)
    tensors = {"labels": labels.masked_fill(torch.rand(shape, generator=gen) < 0.3, IGNORE)}
    if packed:
        lengths = torch.tensor([0, 2 * size, *[size] * (S - 2), 0])
        tensors["cu_seqlens"] = lengths.cumsum(0).to(torch.int32)
    return gen, shape, tensors


def _reference_sums(gen: torch.Generator, S: int, reference: str | None) -> dict[str, Tensor]:
    if reference == "pairs":
        return {f"ref_{side}_logps": torch.randn(S // 2, generator=gen) - 9.0 for side in ("chosen", "rejected")}
    if reference == "unpaired":
        return {
            "ref_logps": torch.randn(S, generator=gen).double() - 9.0,
            "is_chosen": torch.rand(S, generator=gen) < 0.5,
        }
    return {}


def _logits(size: int, *, packed: bool = False, reference: str | None = None) -> dict[str, Tensor]:
    gen, shape, tensors = _tokens(size, packed=packed)
    tensors["logits"] = torch.randn(*shape, 15 + size, generator=gen)
    if reference == "tokens":
        tensors["ref_logits"] = torch.randn(*shape, 15 + size, generator=gen)
    return tensors | _reference_sums(gen, 2 * (size // 2), reference)


def _hidden(size: int, *, packed: bool = False, reference: str | None = None) -> dict[str, Tensor]:
    gen, shape, tensors = _tokens(size, packed=packed)
    for prefix in ("", "ref_") if reference == "tokens" else ("",):
        D, V = size + len(prefix), 15 + size
        for name, sizes in (("hidden_states", (*shape, D)), ("lm_head_weight", (V, D)), ("lm_head_bias", (V,))):
            tensors[prefix + name] = torch.randn(sizes, generator=gen)
    return tensors | _reference_sums(gen, 2 * (size // 2), reference)


def _one(make: Callable[..., dict[str, Tensor]], size: int) -> dict[str, Tensor]:
    """A single sequence, without a dimension for the batch."""
    return {name: x for name, x in make(size, packed=True).items() if name != "cu_seqlens"}


def _vectors(*names: str, size: int) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(size)
    tensors = {name: torch.randn(size, generator=gen) for name in names}
    kinds = {"is_chosen": torch.bool, "ref_logps": torch.float64}
    return {name: (x > 0 if name == "is_chosen" else x).to(kinds.get(name, x.dtype)) for name, x in tensors.items()}


def _table(size: int) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(size)
    ref_probs, log_ratios = torch.randn(2, size, size + 1, generator=gen)
    return {"ref_probs": ref_probs.softmax(-1), "log_ratios": log_ratios}


def _calls() -> Iterator[Call]:
    d = dil_kernels
    logits, hidden = ("logits",), ("hidden_states", "lm_head_weight", "lm_head_bias")
    for function, make, gradients, how in (
        (d.token_logps, _logits, logits, LOGITS),
        (d.linear_token_logps, _hidden, hidden, HEAD),
    ):
        yield Call(function, "padded", make, gradients, {"return_statistics": True}, how)
        yield Call(function, "one sequence", partial(_one, make), gradients, {}, how)
    for function, make, gradients, how in (
        (d.sequence_logps, _logits, logits, LOGITS),
        (d.linear_sequence_logps, _hidden, hidden, HEAD),
    ):
        yield Call(function, "padded", make, gradients, {"shift": False}, how)
        yield Call(function, "packed", partial(make, packed=True), gradients, {"average_log_prob": True}, how)
    for function, make, gradients, how in (
        (d.fused_dil_loss, _logits, logits, LOGITS),
        (d.fused_linear_dil_loss, _hidden, hidden, HEAD),
    ):
        unpaired = {"loss_type": "brier", "reduction": "none", "average_log_prob": False}
        packed = {"loss_type": "bce", "pair_layout": "interleaved"}
        for name, loss, options in (
            ("pairs", {"loss_type": "power"}, POWER),
            ("tokens", {"loss_type": "dpo"}, DPO),
            ("unpaired", unpaired, LOSS | NLL),
        ):
            yield Call(function, name, partial(make, reference=name), gradients, loss, how | options)
        inputs = partial(make, packed=True, reference="tokens")
        yield Call(function, "packed", inputs, gradients, packed, how | NON_NEGATIVE)
        for link, options in (("ratio", RATIO), ("f_dpo", BETA)):
            yield Call(function, link, partial(make, reference="tokens"), gradients, {"link": link}, how | options)
    policy, responses = ("policy_chosen_logps", "policy_rejected_logps"), ("policy_logps", "ref_logps", "is_chosen")
    pairs = partial(_vectors, *policy, "ref_chosen_logps", "ref_rejected_logps")
    for loss_type, reduction, options in (
        ("power", "none", POWER),
        ("dpo", "sum", DPO),
        ("lsif", "mean", NON_NEGATIVE),
    ):
        fixed = {"loss_type": loss_type, "reduction": reduction}
        yield Call(d.dil_loss, loss_type, lambda n: pairs(size=n), policy, fixed, options)
    for link, options in (("ratio", RATIO), ("f_dpo", BETA)):
        yield Call(d.dil_loss, link, lambda n: pairs(size=n), policy, {"loss_type": "brier", "link": link}, options)
    for loss_type, reduction, options in (("power", "none", POWER | NLL), ("ukl", "mean", NON_NEGATIVE)):
        fixed = {"loss_type": loss_type, "reduction": reduction}
        make = partial(_vectors, *responses)
        yield Call(d.unpaired_dil_loss, loss_type, lambda n, m=make: m(size=n), responses[:1], fixed, options)
    for names in (("scores",), ("scores", "is_chosen")):
        make = partial(_vectors, *names)
        yield Call(density_ratio_reward_loss, names[-1], lambda n, m=make: m(size=2 * n), names[:1], {}, LOSS)
    yield Call(tabular_policy, "table", _table, (), {}, {"beta": (1.0, 0.5, 2.0)})


CALLS = list(_calls())


def public_functions() -> list[Callable[..., Any]]:
    """Those that take tensors."""
    exported = [getattr(dil_kernels, name) for name in dil_kernels.__all__]
    functions = [*filter(inspect.isfunction, exported), density_ratio_reward_loss, tabular_policy]
    return [f for f in functions if parameters_of(f, "Tensor")]


def parameters_of(function: Callable[..., Any], kind: str) -> set[str]:
    """The names of its parameters that may be of some type."""
    return {p.name for p in inspect.signature(function).parameters.values() if kind in str(p.annotation)}
