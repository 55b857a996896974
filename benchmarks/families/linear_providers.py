"""Every implementation of a preference loss from hidden states and the head, each called as it costs least."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear, pad

import dil_kernels
from families.linear_inputs import BETA, IGNORE_INDEX, Inputs, LossFromHidden, TokenLogps, loss_of_token_logps
from harness.family import OURS, Provider
from harness.peers import compile_problem, not_run, our_label, our_version, peer_problem, peer_version

BASELINE = "eager"


def _ours(stash_bytes: int | None, inputs: Inputs) -> tuple[Tensor, Tensor]:
    head = {"stash_bytes": stash_bytes}
    if inputs.task == "nll":
        logps = dil_kernels.linear_token_logps(inputs.hidden, inputs.weight, inputs.labels, **head)
        return loss_of_token_logps(logps, None, inputs)
    if inputs.task == "reference":
        head |= {"ref_hidden_states": inputs.ref_hidden, "ref_lm_head_weight": inputs.ref_weight}
    else:
        zeros = torch.zeros(len(inputs.labels) // 2, device=inputs.labels.device)
        head |= {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
    output = dil_kernels.fused_linear_dil_loss(
        inputs.hidden, inputs.weight, inputs.labels, loss_type="dpo", beta=BETA, average_log_prob=False, **head
    )
    return output.loss, torch.cat([output.chosen_rewards, output.rejected_rewards]).detach()


def _eager_token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """[2B, T, D] and [2B, T] -> [2B, T - 1]: all logits, a slice, fp32 log_softmax, gather, mask."""
    logits, labels = linear(hidden, weight)[:, :-1], labels[:, 1:]
    scored = labels != IGNORE_INDEX
    logps = logits.float().log_softmax(-1).gather(-1, labels.masked_fill(~scored, 0).unsqueeze(-1)).squeeze(-1)
    return logps * scored


def eager_loss(inputs: Inputs, token_logps: TokenLogps = _eager_token_logps) -> tuple[Tensor, Tensor]:
    """The head of the model, then what trainers do with its logits."""
    reference = None
    if inputs.ref_hidden is not None and inputs.ref_weight is not None:
        with torch.no_grad():
            reference = token_logps(inputs.ref_hidden, inputs.ref_weight, inputs.labels)
    return loss_of_token_logps(token_logps(inputs.hidden, inputs.weight, inputs.labels), reference, inputs)


def _build_compiled() -> LossFromHidden:
    # Without this, the ninth shape of a run would silently fall back to eager.
    torch.compiler.reset()
    return functools.partial(eager_loss, token_logps=torch.compile(_eager_token_logps, dynamic=False, fullgraph=True))


def _of_scored_rows(token_logps: TokenLogps) -> LossFromHidden:
    """A loss that hands only the scored rows to `token_logps`."""

    def padded(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        scored = labels[:, 1:] != IGNORE_INDEX
        logps = token_logps(hidden[:, :-1][scored], weight, labels[:, 1:][scored])
        return torch.zeros(scored.shape, device=hidden.device).masked_scatter(scored, logps.float())

    return functools.partial(eager_loss, token_logps=padded)


def _compacted(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear(hidden, weight).float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


class _Products(torch.autograd.Function):
    """x @ weight^T, and its result as the upstream gradient of both factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Zero, for the autograd graph."""
        product = x @ weight.t()
        ctx.save_for_backward(x, weight, product)
        return product.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """Those that are asked for."""
        x, weight, product = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return product @ weight if wanted[0] else None, product.t() @ x if wanted[1] else None


def _products(inputs: Inputs) -> tuple[Tensor, Tensor]:
    scored = inputs.labels[:, 1:] != IGNORE_INDEX
    zero = _Products.apply(inputs.hidden[:, :-1][scored], inputs.weight)
    if inputs.ref_hidden is not None and inputs.ref_weight is not None:
        with torch.no_grad():
            _Products.apply(inputs.ref_hidden[:, :-1][scored], inputs.ref_weight)
    return zero, zero.detach()


def _build_trl() -> LossFromHidden:
    from trl.kernels import ChunkedLogProbFunction

    vocabulary_chunk = 32768  # as TRL's trainers call it

    def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, vocabulary_chunk, None, 1.0, ())[0]

    return _of_scored_rows(token_logps)


def _build_cce() -> LossFromHidden:
    from cut_cross_entropy import linear_cross_entropy

    def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce")

    return _of_scored_rows(token_logps)


def _build_liger_scaled() -> LossFromHidden:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)

    return _of_scored_rows(token_logps)


def _build_verl() -> LossFromHidden:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, 1.0, "none")[0]  # with the entropies as the second

    return _of_scored_rows(token_logps)


def _torch_problem(_device: torch.device) -> str | None:
    """F.linear_cross_entropy is new in PyTorch 2.13."""
    return None if hasattr(functional, "linear_cross_entropy") else f"PyTorch {torch.__version__} has none"


def _build_torch_of_tokens() -> LossFromHidden:
    def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -functional.linear_cross_entropy(hidden, weight, targets, reduction="none")

    return _of_scored_rows(token_logps)


def _build_torch_mean() -> LossFromHidden:
    """Chunked, as its documentation advises for memory."""
    options = torch.nn.LinearCrossEntropyOptions()
    return _of_mean_cross_entropy(functools.partial(functional.linear_cross_entropy, options=options))


def _build_liger_dpo(compiled: bool) -> LossFromHidden:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    torch.compiler.reset()

    def loss(inputs: Inputs) -> tuple[Tensor, Tensor]:
        if inputs.task == "nll":
            raise NotImplementedError("a loss of pairs only")
        with_reference = inputs.task == "reference"
        function = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=with_reference, compiled=compiled)
        targets = pad(inputs.labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # so that the hidden states need no slice
        loss, (chosen, rejected, *_, chosen_rewards, rejected_rewards) = function(
            inputs.weight, inputs.hidden, targets, ref_input=inputs.ref_hidden, ref_weight=inputs.ref_weight
        )
        if with_reference:
            chosen, rejected = chosen_rewards / BETA, rejected_rewards / BETA
        return loss, torch.cat([chosen, rejected]).detach()

    return loss


def _of_mean_cross_entropy(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LossFromHidden:
    """For `cross_entropy(hidden [R, D], weight, targets [R]) -> mean []` of scored rows."""

    def loss(inputs: Inputs) -> tuple[Tensor, Tensor]:
        if inputs.task != "nll":
            raise NotImplementedError("takes one upstream gradient for all tokens only")
        scored = inputs.labels[:, 1:] != IGNORE_INDEX
        mean = cross_entropy(inputs.hidden[:, :-1][scored], inputs.weight, inputs.labels[:, 1:][scored])
        return mean, -(mean.detach() * scored.sum()).unsqueeze(0)

    return loss


def _build_liger_flce() -> LossFromHidden:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _of_mean_cross_entropy(liger_fused_linear_cross_entropy)


def _build_liger_cute() -> LossFromHidden:
    from liger_kernel.functional import fused_linear_cross_entropy

    return _of_mean_cross_entropy(lambda *args: fused_linear_cross_entropy(*args, impl="nvidia-cutedsl")[0])


def _build_quack() -> LossFromHidden:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _of_mean_cross_entropy(chunked_linear_cross_entropy)


def _installed_problem(distribution: str, module: str) -> Callable[[torch.device], str | None]:
    """For a package that runs on either kind of device."""
    return lambda device: peer_problem(distribution, module, device.type)(device)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            OURS,
            "dil_kernels.fused_linear_dil_loss, backend auto",
            lambda: functools.partial(_ours, None),
            version=our_version,
            label=our_label,
        ),
        Provider(
            f"{OURS}-no-stash",
            "dil_kernels.fused_linear_dil_loss, stash_bytes=0",
            lambda: functools.partial(_ours, 0),
            version=our_version,
        ),
        Provider(BASELINE, "the head, slice, fp32 log_softmax over every row, gather, mask", lambda: eager_loss),
        Provider("eager-compacted", "the same on the scored rows alone", lambda: _of_scored_rows(_compacted)),
        Provider("products", "the matrix products of the scored rows alone", lambda: _products, checked=False),
        Provider("torch.compile", "eager under torch.compile", _build_compiled, problem=compile_problem),
        Provider(
            "torch-lce",
            "torch.nn.functional.linear_cross_entropy, reduction none, on the scored rows",
            _build_torch_of_tokens,
            problem=_torch_problem,
            rounds_results=True,
        ),
        Provider(
            "torch-lce-mean",
            "torch.nn.functional.linear_cross_entropy, reduction mean, chunked, on the scored rows",
            _build_torch_mean,
            problem=_torch_problem,
            rounds_results=True,
        ),
        Provider(
            "trl",
            "trl.kernels.ChunkedLogProbFunction on the scored rows, in TRL's chunks",
            _build_trl,
            problem=_installed_problem("trl", "trl"),
            version=peer_version("trl"),
        ),
        *(
            Provider(
                f"liger-dpo{suffix}",
                f"liger_kernel LigerFusedLinearDPOLoss, compiled={compiled}",
                functools.partial(_build_liger_dpo, compiled),
                problem=_installed_problem("liger-kernel", "liger_kernel"),
                version=peer_version("liger-kernel"),
                rounds_results=True,
            )
            for suffix, compiled in (("", False), ("-compiled", True))
        ),
        Provider(
            "liger-scaled",
            "liger_kernel LigerFusedLinearScaledCrossEntropyFunction on the scored rows",
            _build_liger_scaled,
            problem=_installed_problem("liger-kernel", "liger_kernel"),
            version=peer_version("liger-kernel"),
        ),
        Provider(
            "liger-flce",
            "liger_kernel liger_fused_linear_cross_entropy on the scored rows",
            _build_liger_flce,
            problem=peer_problem("liger-kernel", "liger_kernel"),
            version=peer_version("liger-kernel"),
            rounds_results=True,
        ),
        Provider(
            "liger-flce-cute",
            "liger_kernel.functional.fused_linear_cross_entropy, impl nvidia-cutedsl, on the scored rows",
            _build_liger_cute,
            problem=peer_problem("nvidia-cutlass-dsl", "cutlass"),
            version=peer_version("liger-kernel"),
            rounds_results=True,
        ),
        Provider(
            "cce",
            "cut_cross_entropy.linear_cross_entropy, impl cce, reduction none, on the scored rows",
            _build_cce,
            problem=peer_problem("cut-cross-entropy", "cut_cross_entropy"),
            version=peer_version("cut-cross-entropy"),
            rounds_results=True,
        ),
        Provider(
            "quack",
            "quack.linear_cross_entropy.chunked_linear_cross_entropy on the scored rows",
            _build_quack,
            problem=peer_problem("quack-kernels", "quack"),
            version=peer_version("quack-kernels"),
            rounds_results=True,
        ),
        Provider(
            "verl",
            "verl.utils.kernel.linear_cross_entropy, Triton, reduction none, on the scored rows",
            _build_verl,
            problem=peer_problem("verl", "verl"),
            version=peer_version("verl"),
        ),
        not_run("unsloth", "Unsloth's fused preference loss", "runs on CUDA only, inside Unsloth's own trainer"),
        not_run("liger-tp", "liger_kernel scaled cross entropy over a vocabulary of several ranks", "needs NVSHMEM"),
    )
}
