"""One training run from data to saved model: a live line, a before/after table, a plot, a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dil_kernels.training.checkpoints import NO_CHECKPOINT, SavingError, saving, where_to_resume
from dil_kernels.training.generations import GENERATIONS_NAME
from dil_kernels.training.held_out import BeforeAfter, HeldOutBefore, score_held_out
from dil_kernels.training.model_card import CARD_NAME, PLOT_NAME, CardNotes
from dil_kernels.training.output_dir import RemoveEarlier, continues
from dil_kernels.training.progress import LiveLines, LiveProgress, close_bars
from dil_kernels.training.start import CannotStartError
from dil_kernels.training.trainer import DILConfig, DILTrainer
from dil_kernels.wording import describe_error

RESULTS_NAME = "before_after.json"


class SetupError(RuntimeError):
    """Options, data and model that do not make a run; the message says why."""


class TrainingError(RuntimeError):
    """A run that failed after it had begun; the message says why, and where to go on from."""


class TrainingInterrupt(KeyboardInterrupt):
    """A run that was interrupted; the message says where to go on from."""


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
    overwrite: bool = False,
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
        overwrite: remove checkpoints and reports of an earlier run from the output directory when training begins, and
            its model before this one's is saved; nothing of a run that is resumed there.

    Returns:
        The scores of the held-out responses before and after training; None without any, and where a run that was
        resumed does not know those from before.

    Raises:
        SetupError: they do not fit each other, a package is missing, the hub refuses the repository, there would be no
            step, or the checkpoint is not whole or of another run.
        TrainingError: training, or writing its results, failed.
        TrainingInterrupt: for a `KeyboardInterrupt` in training.
    """
    resumed = resume_from_checkpoint is True or continues(str(config.output_dir), resume_from_checkpoint or None)
    overwrite = overwrite and not resumed
    earlier = RemoveEarlier()
    try:
        trainer = DILTrainer(
            model=model,
            ref_model=ref_model,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[earlier] if overwrite else None,  # before those that write reports of this run
        )
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise SetupError(str(error)) from error
    trainer.remove_callback(PrinterCallback if config.disable_tqdm else ProgressCallback)
    trainer.add_callback(LiveLines if config.disable_tqdm else LiveProgress)

    def where_to_go_on() -> str:
        return NO_CHECKPOINT if overwrite and not earlier.removed else where_to_resume(str(config.output_dir))

    held_out = HeldOutBefore(trainer)
    if eval_dataset is not None:
        trainer.add_callback(held_out)
    try:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint or None)
        results = None
        if eval_dataset is not None:
            after = score_held_out(trainer)
            results = None if held_out.scores is None else BeforeAfter(held_out.scores, after)
        trainer.card_notes = CardNotes(sources or {}, results)
        with saving(f"the trained model ({config.output_dir})", config.output_dir):
            if overwrite:
                earlier.before_saving(config)
            _save(trainer, results)
    except CannotStartError as error:
        raise SetupError(str(error)) from error
    except (FloatingPointError, SavingError) as error:  # which say where to go on from
        raise TrainingError(str(error)) from error
    except Exception as error:  # whatever model, data loader, disk and packages raise
        raise TrainingError(f"{describe_error(error)}; {where_to_go_on()}") from error
    except KeyboardInterrupt as error:
        raise TrainingInterrupt(where_to_go_on()) from error
    finally:
        close_bars(trainer)
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
