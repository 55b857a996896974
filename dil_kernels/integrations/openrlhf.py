"""OpenRLHF: `deepspeed --module dil_kernels.integrations.openrlhf`, in place of `openrlhf.cli.train_dpo`.

    deepspeed --module dil_kernels.integrations.openrlhf --dil.loss_type lsif --dil.alpha 0.5 ...

Options that begin with --dil. are the fields of `HookOptions`, with values as in JSON; the rest is OpenRLHF's.
"""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import sys
from typing import Any

import torch
from openrlhf.trainer import dpo_trainer
from torch import Tensor, nn

from dil_kernels.data.batches import IGNORE_INDEX
from dil_kernels.integrations.hooks import Hook, HookOptions, check_trainer, refuse

COMMAND = "openrlhf.cli.train_dpo"
PREFIX = "--dil."
PACKAGE = check_trainer(
    "openrlhf",
    ("0.11.2",),
    {
        dpo_trainer.DPOTrainer.__init__: (
            *("self", "model", "ref_model", "strategy", "tokenizer", "optim", "train_dataloader", "eval_dataloader"),
            *("scheduler", "max_norm", "beta", "max_epochs", "save_hf_ckpt", "disable_ds_ckpt"),
        ),
        dpo_trainer.DPOTrainer.concatenated_forward: (
            *("self", "model", "chosen_ids", "c_mask", "reject_ids", "r_mask", "prompt_id_lens"),
        ),
        dpo_trainer.DPOTrainer.concatenated_inputs: (
            *("self", "chosen_ids", "c_mask", "reject_ids", "r_mask", "prompt_id_lens"),
        ),
    },
)
UNUSED = {"beta": 0.1, "label_smoothing": 0.0, "ipo_enable": False}
UNSUPPORTED = {"packing_samples": False, "ring_attn_size": 1, "tensor_parallel_size": 1, "deepcompile": False}


class DILTrainer(dpo_trainer.DPOTrainer):
    """OpenRLHF's trainer of preference pairs with the losses and the fused head of dil_kernels.

    The balancing loss of mixtures of experts and the NLL of chosen responses are added as ever.

    Raises:
        ValueError: an option that would have no effect.
        NotImplementedError: packing, ring attention, tensor parallelism or DeepCompile.
    """

    options = HookOptions()  # those of the run, see `main`

    def __init__(self, model: nn.Module, ref_model: nn.Module, strategy: Any, *args: Any, **kwargs: Any) -> None:
        refuse(strategy.args.model, UNUSED, "leave it out, or see --dil.loss_type and --dil.beta")
        for name, default in UNSUPPORTED.items():
            if getattr(strategy.args.ds, name, default) != default:
                raise NotImplementedError(f"--ds.{name} does not go with dil_kernels; see --dil.padding_free")
        super().__init__(model, ref_model, strategy, *args, **kwargs)
        self._hook = Hook(PACKAGE, self.options)
        # DeepSpeed has wrapped them already, and calls them as they are then.
        self._hook.install(*map(strategy._unwrap_model, (model, ref_model)))
        self.loss_fn = self._loss

    def concatenated_forward(
        self,
        model: Any,
        chosen_ids: Tensor,
        c_mask: Tensor,
        reject_ids: Tensor,
        r_mask: Tensor,
        prompt_id_lens: list[int],
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Log-probs of chosen and rejected responses [B], the balancing loss, and the NLL of the chosen ones."""
        ids, mask, prompts = self.concatenated_inputs(chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens)
        in_prompt = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(prompts, device=ids.device)[:, None]
        labels = ids.masked_fill((mask == 0) | in_prompt, IGNORE_INDEX)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if not getattr(model, "is_vlm", False):  # which has positions of its own
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).masked_fill(mask == 0, 1)
        responses = self._hook.score(model.model, inputs, labels)
        self._lengths = responses.lengths.chunk(2)
        chosen_logps, rejected_logps = responses.logps.chunk(2)
        means, lengths = chosen_logps / self._lengths[0].clamp(min=1), self._lengths[0]
        nll = -means.sum() / (lengths > 0).sum().clamp(min=1)
        return chosen_logps, rejected_logps, getattr(responses.outputs, "aux_loss", None), nll.float()

    def _loss(self, *logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss, and the rewards, for policy and reference of the batch that was scored last."""
        losses, chosen_rewards, rejected_rewards = self._hook.losses(*logps, *self._lengths)
        return losses.mean(), chosen_rewards, rejected_rewards


def split_arguments(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The options of `HookOptions` on a command line, and the rest of it.

    Args:
        words: of the command line; one that stands alone after --dil. is true, several are a list.

    Raises:
        ValueError: an option stands twice, or has an empty value.
    """
    given: dict[str, Any] = {}
    rest: list[str] = []
    values: list[str] = rest
    for word in words:
        if word.startswith("--"):
            values = rest
        if word.startswith(PREFIX):
            name, has_value, value = word.removeprefix(PREFIX).partition("=")
            if name in given:
                raise ValueError(f"{PREFIX}{name} stands twice, and only one value would be read")
            values = given[name] = [value] if has_value else []
        else:
            values.append(word)
    for name, texts in given.items():
        if not all(text.strip() for text in texts):
            raise ValueError(f"{PREFIX}{name}: the value is empty")
        found = [_value(text) for text in texts]
        given[name] = True if not found else found[0] if len(found) == 1 else found
    return given, rest


def _value(text: str) -> Any:
    # Of numbers JSON has no .1, and Python more than numbers are.
    for convert in (json.loads, float) if re.fullmatch(r"[-+.\deE]+", text) else (json.loads,):
        with contextlib.suppress(ValueError):
            return convert(text)
    return text


def main() -> None:
    """Train as `openrlhf.cli.train_dpo` would, with the `DILTrainer`."""
    given, sys.argv[1:] = split_arguments(sys.argv[1:])
    DILTrainer.options = HookOptions.of(given, PREFIX)
    dpo_trainer.DPOTrainer = DILTrainer
    runpy.run_module(COMMAND, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
