"""DIL with Lightning: `python examples/lightning_loop.py [--model NAME]`.

Labels are scored inside the output heads, without logits. `dil_kernels.integrations.hooks` is what the adapters to
other trainers are made of; it serves any loop.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning
import torch
from shared import load_model, parse_options, tokenized_pairs
from torch import Tensor
from torch.utils.data import DataLoader

from dil_kernels.data import PreferenceCollator
from dil_kernels.integrations.hooks import Hook, HookOptions


class PreferenceModule(lightning.LightningModule):
    """A policy, and a frozen copy of it as the reference."""

    def __init__(self, model: Any, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.policy = model
        self.ref = copy.deepcopy(model).eval().requires_grad_(False)
        self.hook = Hook("Lightning", HookOptions(loss_type="lsif", padding_free=True))
        self.hook.install(self.policy, self.ref)  # before Lightning wraps them

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch of `PreferenceCollator`: the mean over the pairs that have a scored token."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        policy = self.hook.score(self.policy, inputs, batch["labels"])
        with torch.no_grad():
            ref = self.hook.score(self.ref, inputs, batch["labels"])
        logps = (*policy.logps.chunk(2), *ref.logps.chunk(2))
        losses, chosen_rewards, rejected_rewards = self.hook.losses(*logps, *policy.lengths.chunk(2))
        loss = losses.mean()
        if self.global_step % 5 == 0 or self.global_step == self.trainer.max_steps - 1:
            margin = (chosen_rewards - rejected_rewards).mean()
            self.print(f"step {self.global_step}  loss {loss.item():.4f}  margin {margin.item():.4f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.policy.parameters(), lr=self.learning_rate)


def main(argv: list[str] | None = None) -> None:
    """Train on the embedded pairs."""
    options = parse_options(__doc__, argv)
    model, tokenizer = load_model(options.model)
    collate = PreferenceCollator(tokenizer.pad_token_id)
    lightning.seed_everything(0)
    loader = DataLoader(
        tokenized_pairs(tokenizer), options.batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=options.steps, **quiet)
    trainer.fit(PreferenceModule(model, options.learning_rate), loader)


if __name__ == "__main__":
    main()
