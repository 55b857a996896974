"""One training run from data to saved model: a live line, a before/after table, a plot, a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from dil_kernels.trainer import DILConfig, DILTrainer
from dil_kernels.training.generations import GENERATIONS_NAME
from dil_kernels.training.held_out import BeforeAfter, HeldOutBefore, score_held_out
from dil_kernels.training.model_card import CARD_NAME, PLOT_NAME, CardNotes

RESULTS_NAME = "before_after.json"
LIVE_METRICS = ("loss", "rewards/margins", "rewards/accuracies")


class SetupError(Exception):
    """Options, data and model that do not make a trainer; the message says why."""


class LiveProgress(ProgressCallback):
    """A progress bar with the last logged loss, margin and accuracy at its end."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show training metrics in the bar, and evaluation metrics on a line of their own."""
        if self.training_bar is None or logs is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(_format_metrics(logs, ""))
        elif "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: {_format_metrics(logs, 'eval_')}")


def _format_metrics(logs: dict[str, Any], prefix: str) -> str:
    return " ".join(f"{prefix}{name}={logs[prefix + name]:.3f}" for name in LIVE_METRICS if prefix + name in logs)


def run_training(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: DILConfig,
    train_dataset: datasets.Dataset,
    eval_dataset: datasets.Dataset | None = None,
    *,
    ref_model: PreTrainedModel | None = None,
    resume_from_checkpoint: str | bool = False,
    sources: Mapping[str, Any] | None = None,
) -> BeforeAfter | None:
    """Train, save model and tokenizer, print the before/after table, plot the training curves, write a model card.

    Writes the model, the tokenizer, the trainer's state, README.md with training_curves.png and, with held-out
    responses, before_after.json into `config.output_dir`, and uploads them with `config.push_to_hub`.

    Args:
        model: the policy; it is trained in place.
        tokenizer: of the model.
        config: of the trainer.
        train_dataset: as of `DILTrainer`.
        eval_dataset: held-out responses.
        ref_model: as of `DILTrainer`.
        resume_from_checkpoint: a checkpoint, or True for the last complete one.
        sources: where model and data came from, for the model card: options of `dil-train` by name.

    Returns:
        The scores of the held-out responses before and after training; None without any, and where a run that was
        resumed does not know those from before.

    Raises:
        SetupError: they do not fit each other, a package is missing, or the hub refuses the repository.
    """
    try:
        trainer = DILTrainer(
            model=model,
            ref_model=ref_model,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )
    except (ValueError, ImportError, OSError) as error:
        raise SetupError(str(error)) from error
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LiveProgress)
    held_out = HeldOutBefore(trainer)
    if eval_dataset is not None:
        trainer.add_callback(held_out)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint or None)
    results = None
    if eval_dataset is not None:
        after = score_held_out(trainer)
        results = None if held_out.scores is None else BeforeAfter(held_out.scores, after)
    trainer.card_notes = CardNotes(sources or {}, results)
    _save(trainer, results)
    return results


def _save(trainer: DILTrainer, results: BeforeAfter | None) -> None:
    """Write what came of a run, the model last: with push_to_hub, saving it uploads the whole directory."""
    output_dir = Path(str(trainer.args.output_dir))
    output_dir.mkdir(parents=True, exist_ok=True)
    if results is not None and trainer.is_world_process_zero():
        (output_dir / RESULTS_NAME).write_text(json.dumps(results.to_dict(), indent=2) + "\n")
        print(f"\n{results.table()}\n")
    trainer.save_state()
    trainer.save_model()
    trainer.create_model_card()  # after the one that peft writes
    if not trainer.is_world_process_zero():
        return
    print(f"model and tokenizer  {output_dir}")
    for label, name in (("model card", CARD_NAME), ("training curves", PLOT_NAME), ("generations", GENERATIONS_NAME)):
        if (output_dir / name).is_file():
            print(f"{label:<21}{output_dir / name}")
