"""One training run from data to saved model: a live line, a before/after table on held-out pairs, a plot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from dil_kernels.functional import sequence_logps
from dil_kernels.packed_batches import model_inputs
from dil_kernels.plots import plot_training_curves
from dil_kernels.trainer import DILConfig, DILTrainer

PLOT_NAME = "training_curves.png"
RESULTS_NAME = "before_after.json"
LIVE_METRICS = ("loss", "rewards/margins", "rewards/accuracies")


@dataclass(frozen=True)
class PairScores:
    """How likely a model finds the responses of every pair of a data set."""

    chosen: Tensor  # [pairs], mean log-prob per token, or the sum if not per_token
    rejected: Tensor  # [pairs]
    per_token: bool

    @property
    def margins(self) -> Tensor:
        """Chosen minus rejected, [pairs]."""
        return self.chosen - self.rejected

    def summary(self) -> dict[str, float]:
        """Means over the pairs; accuracy is the share of them whose chosen response is the likelier."""
        return {
            "chosen_logps": self.chosen.mean().item(),
            "rejected_logps": self.rejected.mean().item(),
            "margin": self.margins.mean().item(),
            "accuracy": (self.margins > 0).double().mean().item(),
        }


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


def score_pairs(trainer: DILTrainer) -> PairScores:
    """Log-probs that the trainer's model, as it is now, gives to the responses of its evaluation pairs."""
    model: Any = trainer.model
    args = trainer.args
    training = model.training
    model.eval()
    scores = []
    for batch in trainer.get_eval_dataloader():
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logits = model(**model_inputs(batch)).logits
        packed, average = {"cu_seqlens": batch.get("cu_seqlens")}, args.average_log_prob
        logps = sequence_logps(logits, batch["labels"], **packed, average_log_prob=average, backend=args.backend)
        scores.append(trainer.accelerator.gather_for_metrics(torch.stack(logps.chunk(2), dim=1)).cpu())
    model.train(training)
    chosen, rejected = torch.cat(scores).unbind(1)
    return PairScores(chosen, rejected, args.average_log_prob)


def before_after_table(before: PairScores, after: PairScores) -> str:
    """What training changed on held-out pairs, as an aligned text table."""
    unit = "per token" if before.per_token else "per response"
    first, last = before.summary(), after.summary()
    rows: list[tuple[str, ...]] = [(f"{len(before.margins)} held-out pairs", "before", "after", "change")]
    for key, label in (
        ("chosen_logps", f"chosen log-prob, {unit}"),
        ("rejected_logps", f"rejected log-prob, {unit}"),
        ("margin", "margin (chosen - rejected)"),
    ):
        rows.append((label, *(f"{value:.3f}" for value in (first[key], last[key])), f"{last[key] - first[key]:+.3f}"))
    accuracies = (first["accuracy"], last["accuracy"])
    change = accuracies[1] - accuracies[0]
    rows.append(("accuracy (chosen likelier)", *(f"{value:.1%}" for value in accuracies), f"{100 * change:+.1f} pt"))
    lines = [f"{label:<32}{old:>10}{new:>10}{delta:>11}" for label, old, new, delta in rows]
    grown = int((after.margins > before.margins).sum())
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:], rule, f"The margin grew in {grown} of {len(before.margins)} pairs."])


def run_training(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: DILConfig,
    train_dataset: datasets.Dataset,
    eval_dataset: datasets.Dataset | None = None,
    *,
    ref_model: PreTrainedModel | None = None,
    resume_from_checkpoint: str | bool = False,
) -> tuple[PairScores, PairScores] | None:
    """Train, save model and tokenizer, print the before/after table and plot the training curves.

    Writes the model, the tokenizer, the trainer's state, training_curves.png and, with held-out pairs,
    before_after.json into `config.output_dir`.

    Args:
        model: the policy; it is trained in place.
        tokenizer: of the model.
        config: of the trainer.
        train_dataset: as of `DILTrainer`.
        eval_dataset: held-out pairs.
        ref_model: as of `DILTrainer`.
        resume_from_checkpoint: a checkpoint, or True for the last complete one.

    Returns:
        The scores of the held-out pairs before and after training; None without such pairs (none at all, or unpaired).
    """
    trainer = DILTrainer(
        model=model,
        ref_model=ref_model,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LiveProgress)
    in_pairs = eval_dataset is not None and "label" not in eval_dataset.column_names
    before = score_pairs(trainer) if in_pairs else None
    trainer.train(resume_from_checkpoint=resume_from_checkpoint or None)
    after = score_pairs(trainer) if in_pairs else None
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        _report(trainer, before, after)
    return None if before is None or after is None else (before, after)


def _report(trainer: DILTrainer, before: PairScores | None, after: PairScores | None) -> None:
    """Write and print what came of a run."""
    output_dir = Path(str(trainer.args.output_dir))
    if before is not None and after is not None:
        results: dict[str, Any] = {"pairs": len(before.margins), "per_token": before.per_token}
        results |= {"before": before.summary(), "after": after.summary()}
        (output_dir / RESULTS_NAME).write_text(json.dumps(results, indent=2) + "\n")
        print(f"\n{before_after_table(before, after)}\n")
    print(f"model and tokenizer  {output_dir}")
    if plot_training_curves(trainer.state.log_history, output_dir / PLOT_NAME):
        print(f"training curves      {output_dir / PLOT_NAME}")
