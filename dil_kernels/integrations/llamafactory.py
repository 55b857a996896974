"""LLaMA-Factory: `python -m dil_kernels.integrations.llamafactory train.yaml`, in place of `llamafactory-cli train`.

    stage: dpo
    dil:
      loss_type: lsif

The block `dil`, or `dil.loss_type=lsif` after the file, has the fields of `HookOptions`; the rest is LLaMA-Factory's.
Where LLaMA-Factory starts torchrun, torchrun starts this module again.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

from llamafactory import launcher
from llamafactory.hparams import read_args
from llamafactory.train import tuner
from llamafactory.train.dpo import trainer as dpo_trainer
from torch import Tensor, nn

from dil_kernels.integrations.hooks import Hook, HookOptions, check_trainer, refuse

PACKAGE = check_trainer(
    "llamafactory",
    ("0.9.5",),
    {
        dpo_trainer.CustomDPOTrainer.__init__: (
            *("self", "model", "ref_model", "finetuning_args", "processor", "disable_dropout", "kwargs"),
        ),
        dpo_trainer.CustomDPOTrainer.concatenated_forward: ("self", "model", "batch", "is_ref_model"),
        dpo_trainer.CustomDPOTrainer.compute_preference_loss: (
            *("self", "policy_chosen_logps", "policy_rejected_logps"),
            *("reference_chosen_logps", "reference_rejected_logps"),
        ),
        tuner.run_exp: ("args", "callbacks"),
    },
)
UNUSED = {"pref_loss": "sigmoid", "dpo_label_smoothing": 0.0, "ld_alpha": None}
OTHER_LAUNCHES = ("USE_RAY", "USE_MCA", "USE_V1")  # whose processes do not come by here


class DILTrainer(dpo_trainer.CustomDPOTrainer):
    """LLaMA-Factory's trainer of preference pairs with the losses and the fused head of dil_kernels.

    pref_ftx and pref_bco_weight add LLaMA-Factory's own terms as ever, the latter with pref_beta. The metrics logits/*
    are means over the scored tokens, not over prompts and padding, too.

    Raises:
        ValueError: an option that would have no effect.
    """

    options = HookOptions()  # those of the run, see `main`

    def __init__(
        self, model: nn.Module, ref_model: nn.Module | None, finetuning_args: Any, *args: Any, **kwargs: Any
    ) -> None:
        without_bco = {} if finetuning_args.pref_bco_weight else {"pref_beta": 0.1}
        refuse(finetuning_args, UNUSED | without_bco, "leave it out, or see dil.loss_type and dil.beta")
        self._hook = Hook(PACKAGE, self.options)
        self._hook.install(model, ref_model)
        super().__init__(model, ref_model, finetuning_args, *args, **kwargs)

    def concatenated_forward(
        self, model: nn.Module, batch: dict[str, Tensor], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        """Log-probs of the responses of a batch, chosen ones first, and what LLaMA-Factory logs of them."""
        inputs = dict(batch)
        responses = self._hook.score(model, inputs, inputs.pop("labels"), return_mean_logits=not is_ref_model)
        chosen_logps, rejected_logps = responses.logps.chunk(2)
        self._lengths = responses.lengths.chunk(2)
        output = {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps}
        output["chosen_logps_avg"] = chosen_logps / self._lengths[0].clamp(min=1)
        if responses.mean_logits is not None:
            output["chosen_logits"], output["rejected_logits"] = responses.mean_logits.chunk(2)
        return output

    def dpo_loss(self, *logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each pair, and the rewards, for policy and reference of the batch that was scored last."""
        return self._hook.losses(*logps, *self._lengths)


def main() -> None:
    """Train as `llamafactory-cli train` would, with the `DILTrainer`."""
    args = read_args()
    if not isinstance(args, dict):
        raise SystemExit("usage: python -m dil_kernels.integrations.llamafactory train.yaml [name=value ...]")
    given: Any = args.pop("dil", None)
    if args.get("stage") != "dpo":
        raise ValueError(f"stage must be dpo, got {args.get('stage')!r}")
    for name in OTHER_LAUNCHES:
        if os.environ.get(name, "0").lower() in ("1", "true", "y"):
            raise NotImplementedError(f"{name} is set, but dil_kernels goes with LLaMA-Factory's own launch only")
    if inspect.getsource(launcher.launch).count("file_name=__file__") != 2:
        raise ImportError(f"{PACKAGE} starts torchrun in another way than this adapter knows")
    DILTrainer.options = HookOptions.of(given, "dil")
    dpo_trainer.CustomDPOTrainer = DILTrainer
    if "LOCAL_RANK" in os.environ:  # of torchrun
        tuner.run_exp(args)
        return
    run_exp = tuner.run_exp
    tuner.run_exp = lambda: run_exp(args)
    launcher.__file__ = f"--module {__spec__.name}"  # what LLaMA-Factory has torchrun start
    sys.argv.insert(1, "train")
    launcher.launch()


if __name__ == "__main__":
    main()
