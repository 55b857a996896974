"""What training changes on held-out responses: their log-probs before and after, as a table."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dil_kernels.data.json_text import parse_json
from dil_kernels.data.token_columns import is_unpaired
from dil_kernels.training.metrics import PREDICTIONS
from dil_kernels.training.ref_cache import dataset_fingerprint

logger = logging.getLogger(__name__)

BEFORE_NAME = "held_out_before.json"


@dataclass(frozen=True)
class HeldOutScores:
    """How likely a model finds the responses of a data set.

    Attributes:
        chosen: the mean log-prob per token of each chosen response, or the sum if not per_token.
        rejected: likewise; in pairs, that beside each chosen one.
        per_token: which of the two.
        in_pairs: whether chosen and rejected responses belong together.
    """

    chosen: list[float]
    rejected: list[float]
    per_token: bool
    in_pairs: bool

    def summary(self) -> dict[str, float]:
        """Means over the responses; accuracy, of pairs, is the share of them whose chosen response is the likelier."""
        means = {
            "chosen_logps": _mean(self.chosen),
            "rejected_logps": _mean(self.rejected),
            "margin": _mean(self.chosen) - _mean(self.rejected),
        }
        if self.in_pairs:
            means["accuracy"] = _mean([float(margin > 0) for margin in self.margins()])
        return means

    def margins(self) -> list[float]:
        """Chosen minus rejected, of every pair."""
        return [chosen - rejected for chosen, rejected in zip(self.chosen, self.rejected, strict=True)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def score_held_out(trainer: Trainer) -> HeldOutScores:
    """Log-probs that the model, as it is now, gives to the responses of the evaluation data set.

    They take the trainer's own way, so that no logits exist where the head is fused, and any wrapper of the model
    serves. Every process must call this; random numbers drawn afterwards are those without it.

    Args:
        trainer: a `DILTrainer` with one evaluation data set.
    """
    dataset: Any = trainer.eval_dataset
    # Whatever the run's own evaluations keep of their predictions.
    needed = {"prediction_loss_only": False, "eval_do_concat_batches": True}
    given = {name: getattr(trainer.args, name) for name in needed}
    vars(trainer.args).update(needed)
    try:
        with torch.random.fork_rng():
            values = torch.from_numpy(trainer.predict(dataset).predictions).double()
    finally:
        vars(trainer.args).update(given)
    columns = dict(zip(PREDICTIONS, values.unbind(1), strict=True))
    in_pairs, per_token = not is_unpaired(dataset.column_names), trainer.args.average_log_prob  # type: ignore[attr-defined]
    sides = []
    for side in ("chosen", "rejected"):
        lengths = columns[f"{side}_lengths"]
        kept = lengths > 0
        if in_pairs:
            kept = (columns["chosen_lengths"] > 0) & (columns["rejected_lengths"] > 0)
        logps = columns[f"{side}_logps"][kept]
        sides.append((logps / lengths[kept] if per_token else logps).tolist())
    chosen, rejected = sides
    return HeldOutScores(chosen, rejected, per_token, in_pairs)


class HeldOutBefore(TrainerCallback):
    """Scores the held-out responses when training begins, where the model is wrapped as it will be trained.

    The scores are kept in held_out_before.json in the output directory, where a run that is resumed finds them.

    Attributes:
        scores: None until training began, and where a resumed run finds none.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.scores: HeldOutScores | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score, or read what the run that is resumed scored."""
        if self.scores is not None:  # training begins anew (auto_find_batch_size)
            return
        path = Path(str(args.output_dir)) / BEFORE_NAME
        dataset: Any = self._trainer.eval_dataset
        data = dataset_fingerprint(dataset)
        if state.global_step > 0:
            self.scores = _kept_scores(path, data)
            return
        self.scores = score_held_out(self._trainer)
        if state.is_world_process_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"data": data, **asdict(self.scores)}) + "\n")


def _kept_scores(path: Path, data: str) -> HeldOutScores | None:
    """Those of a file; None where there is none, or, with a warning, a damaged one, or one of other data."""
    try:
        kept = dict(parse_json(path.read_text()))
        if kept.pop("data", None) != data:
            raise ValueError("it is not of this evaluation data")
        scores = HeldOutScores(**kept)
        if not all(type(value) is float for value in [*scores.chosen, *scores.rejected]):
            raise ValueError("it holds no log-probs")
        return scores
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s cannot be used (%s): there will be no table of before and after", path, error)
        return None


def _change(value: float) -> str:
    """With three decimals, or where these would hide it, two digits."""
    return f"{value:+.1e}" if 0 < abs(value) < 5e-4 else f"{value:+.3f}"


@dataclass(frozen=True)
class BeforeAfter:
    """Scores of the same held-out responses before and after training."""

    before: HeldOutScores
    after: HeldOutScores

    @property
    def count(self) -> str:
        """How many there are of what."""
        chosen, rejected = len(self.after.chosen), len(self.after.rejected)
        if self.after.in_pairs:
            return f"{chosen} held-out pairs"
        return f"{chosen} chosen, {rejected} rejected"

    def to_dict(self) -> dict[str, Any]:
        """What before_after.json holds."""
        counts = {"chosen": len(self.after.chosen), "rejected": len(self.after.rejected)}
        if self.after.in_pairs:
            counts = {"pairs": len(self.after.chosen)}
        summaries = {"before": self.before.summary(), "after": self.after.summary()}
        return {**counts, "per_token": self.after.per_token, **summaries}

    def rows(self) -> list[tuple[str, ...]]:
        """A head of four cells, and below it a row a quantity: its name, before, after and the change."""
        unit = "per token" if self.after.per_token else "per response"
        first, last = self.before.summary(), self.after.summary()
        rows: list[tuple[str, ...]] = [(self.count, "before", "after", "change")]
        for key, label in (
            ("chosen_logps", f"chosen log-prob, {unit}"),
            ("rejected_logps", f"rejected log-prob, {unit}"),
            ("margin", "margin (chosen - rejected)"),
        ):
            rows.append((label, f"{first[key]:.3f}", f"{last[key]:.3f}", _change(last[key] - first[key])))
        if "accuracy" in first:
            old, new = first["accuracy"], last["accuracy"]
            rows.append(("accuracy (chosen likelier)", f"{old:.1%}", f"{new:.1%}", f"{100 * (new - old):+.1f} pt"))
        return rows

    def table(self) -> str:
        """The rows, aligned."""
        head, *lines = [f"{label:<32}{old:>10}{new:>10}{change:>11}" for label, old, new, change in self.rows()]
        rule = "-" * len(head)
        lines = [head, rule, *lines, rule]
        if self.after.in_pairs:
            grown = sum(new > old for new, old in zip(self.after.margins(), self.before.margins(), strict=True))
            lines.append(f"The margin grew in {grown} of {len(self.after.chosen)} pairs.")
        return "\n".join(lines)
