"""DIL in a `transformers.Trainer`, by overriding `compute_loss`: `python examples/hf_trainer.py [--model NAME]`.

`dil_kernels.trainer.DILTrainer` is this with metrics, evaluation, precomputed references, and accumulation that stays
exact when micro-batches differ in size.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from shared import load_model, parse_options, tokenized_pairs
from transformers import Trainer, TrainingArguments

from dil_kernels import fused_dil_loss
from dil_kernels.data import PreferenceCollator


class PreferenceTrainer(Trainer):
    """A Trainer whose loss is that of preference pairs, with a frozen copy of the model as the reference."""

    # Our loss is a mean over pairs, so the Trainer has to divide it by the number of micro-batches. Left to guess, it
    # sees labels in the batch and takes the loss for one that was divided by the number of tokens already.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the same for transformers before 5.19
        self.ref = copy.deepcopy(self.model).eval().requires_grad_(False)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """LSIF from the logits of both models; `model` is the wrapped one, which synchronises gradients."""
        labels = inputs["labels"]
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ref_logits = self.ref(**inputs).logits
        out = fused_dil_loss(model(**inputs).logits, labels, ref_logits=ref_logits, loss_type="lsif")
        return (out.loss, out) if return_outputs else out.loss


def main(argv: list[str] | None = None) -> None:
    """Train on the embedded pairs, in two micro-batches a step."""
    options = parse_options(__doc__, argv)
    model, tokenizer = load_model(options.model)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = PreferenceTrainer(
            model=model,
            args=TrainingArguments(
                output_dir,
                per_device_train_batch_size=options.batch_size // 2,
                gradient_accumulation_steps=2,
                max_steps=options.steps,
                learning_rate=options.learning_rate,
                logging_steps=5,
                save_strategy="no",
                report_to=[],
                remove_unused_columns=False,  # the collator needs columns that the model does not take
            ),
            train_dataset=tokenized_pairs(tokenizer),
            data_collator=PreferenceCollator(tokenizer.pad_token_id),
        )
        trainer.train()


if __name__ == "__main__":
    main()
