"""DIL on TRL: `python examples/trl_trainer.py [--model NAME] [--lora]`.

Moving over from `trl.DPOTrainer` is the import: data sets, PEFT, callbacks and the rest of the script stay.
"""

from __future__ import annotations

import copy
import sys
import tempfile

from shared import load_model, parse_options

from dil_kernels.integrations.trl import DILConfig, DILTrainer  # was: from trl import DPOConfig, DPOTrainer
from dil_kernels.quickstart.embedded import load_embedded_pairs


def main(argv: list[str] | None = None) -> None:
    """Train on the embedded pairs, fully or with LoRA adapters; evaluate on the held-out ones."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(__doc__, [word for word in argv if word != "--lora"])
    model, tokenizer = load_model(options.model)
    peft_config = None
    if "--lora" in argv:
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = DILTrainer(
            model=model,
            ref_model=None if peft_config else copy.deepcopy(model),  # may be left out for a model from the hub
            args=DILConfig(
                output_dir,
                loss_type="lsif",
                per_device_train_batch_size=options.batch_size,
                max_steps=options.steps,
                learning_rate=options.learning_rate,
                logging_steps=5,
                bf16=False,
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=load_embedded_pairs("train"),
            eval_dataset=load_embedded_pairs("test"),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()
        print(trainer.evaluate())


if __name__ == "__main__":
    main()
