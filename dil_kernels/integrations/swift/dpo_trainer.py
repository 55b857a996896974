"""ms-swift's trainer of preference pairs, which knows the losses of dil_kernels by their names.

    export DIL_OPTIONS='{"alpha": 0.5}'  # the fields of `HookOptions`, but for loss_type
    swift rlhf --rlhf_type dpo --external_plugins $(python -m dil_kernels.integrations.swift) --loss_type lsif ...

Names of ms-swift's own losses go to ms-swift, also beside one of ours: `--loss_type lsif sft --loss_weights 1 0.1`.
Where both have a loss of a name, `dil.hinge` is ours.
"""

from __future__ import annotations

import os
from typing import Any

from swift.rlhf_trainers import DPOTrainer
from torch import Tensor, nn

from dil_kernels.data.batches import IGNORE_INDEX
from dil_kernels.data.json_text import parse_json
from dil_kernels.integrations.hooks import Hook, HookOptions, check_trainer, refuse, say
from dil_kernels.losses import divergence_names

PACKAGE = check_trainer(
    "ms-swift",
    ("4.6.0",),
    {
        DPOTrainer.concatenated_forward: ("self", "model", "batch", "is_ref_model"),
        DPOTrainer.get_cu_seqlens: ("self", "position_ids", "logits_to_keep"),
        DPOTrainer.dpo_loss: (
            *("self", "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"),
            *("loss_type", "model_output"),
        ),
    },
)
PREFIX = "dil."
OF_SWIFT = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("discopop", "apo_zero", "apo_down", "sft"),
)
UNUSED = {"ld_alpha": None, "reference_free": None}
# Those that only ms-swift's own losses use.
UNUSED_ALONE = {
    "beta": 0.1,
    "label_smoothing": 0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 1.0,
    "discopop_tau": 0.05,
}


class DILTrainer(DPOTrainer):
    """ms-swift's `DPOTrainer` with the losses and the fused head of dil_kernels.

    Raises:
        ValueError: an option that would have no effect, or several losses of dil_kernels at once.
        NotImplementedError: sequence parallelism, or an encoder-decoder.
    """

    def __init__(
        self, model: nn.Module | None = None, ref_model: nn.Module | None = None, *args: Any, **kwargs: Any
    ) -> None:
        config, template = kwargs["args"], kwargs["template"]
        names = [config.loss_type] if isinstance(config.loss_type, str) else list(config.loss_type)
        ours = [name for name in names if _is_ours(name)]
        self._hook: Hook | None = None
        if not ours:
            say(f"dil_kernels in {PACKAGE}: --loss_type {' '.join(names)} names no loss of dil_kernels; ms-swift's own")
        else:
            self._hook, self._name = _make_hook(ours, len(names) == 1, config), ours[0]
            if template.sequence_parallel_size > 1 or template.is_encoder_decoder:
                raise NotImplementedError("neither sequence parallelism nor an encoder-decoder goes with dil_kernels")
            self._hook.install(model, ref_model)
        super().__init__(model, ref_model, *args, **kwargs)

    def concatenated_forward(
        self, model: nn.Module, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        """Log-probs and counts of the responses of a batch, chosen ones first, and what ms-swift logs of them."""
        if self._hook is None:
            return super().concatenated_forward(model, batch, is_ref_model)
        inputs = dict(batch)
        labels, positions = inputs.pop("labels"), inputs.pop("text_position_ids", None)
        cu_seqlens = None
        if self.template.padding_free:
            positions = inputs["position_ids"] if positions is None else positions
            cu_seqlens = self.get_cu_seqlens(positions, None)
            labels = labels.masked_fill(positions.view_as(labels) == 0, IGNORE_INDEX)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        responses = self._hook.score(model, inputs, labels, cu_seqlens, return_mean_logits=not is_ref_model)
        (chosen_logps, rejected_logps), lengths = responses.logps.chunk(2), responses.lengths.chunk(2)
        output = {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps}
        for side, counts in zip(("chosen", "rejected"), lengths, strict=True):
            output[f"{side}_completion_token_counts"] = counts
        if responses.mean_logits is not None:
            output["nll_loss"] = -chosen_logps.sum() / lengths[0].sum().clamp(min=1)
            for side, counts, mean in zip(("chosen", "rejected"), lengths, responses.mean_logits.chunk(2), strict=True):
                output[f"mean_{side}_logits"] = (mean * counts).sum() / counts.sum().clamp(min=1)
        if self.aux_loss_enabled:
            output["aux_loss"] = responses.outputs.aux_loss
        return output

    def dpo_loss(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        loss_type: str = "sigmoid",
        model_output: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each pair under the name `loss_type`, and the rewards."""
        logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
        if self._hook is None or loss_type != self._name:
            return super().dpo_loss(*logps, loss_type, model_output)
        assert model_output is not None
        lengths = (model_output[f"{side}_completion_token_counts"] for side in ("chosen", "rejected"))
        return self._hook.losses(*logps, *lengths)


def _is_ours(name: str) -> bool:
    return name.startswith(PREFIX) or (name in divergence_names() and name not in OF_SWIFT)


def _make_hook(ours: list[str], alone: bool, config: Any) -> Hook:
    text = os.environ.get("DIL_OPTIONS", "").strip() or "{}"
    try:
        given = parse_json(text)
        if not isinstance(given, dict):
            raise ValueError(f"a {type(given).__name__}")
    except ValueError as error:
        raise ValueError(f"DIL_OPTIONS must be a JSON object, got {text!r:.80} ({error})") from error
    if len(ours) > 1:
        raise ValueError(f"--loss_type takes one loss of dil_kernels, got {', '.join(ours)}")
    if "loss_type" in given:
        raise ValueError("DIL_OPTIONS has a loss_type; give it as --loss_type")
    refuse(config, UNUSED | (UNUSED_ALONE if alone else {}), "leave it out, or see DIL_OPTIONS")
    return Hook(PACKAGE, HookOptions.of({**given, "loss_type": ours[0].removeprefix(PREFIX)}, "DIL_OPTIONS"))
