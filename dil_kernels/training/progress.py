"""What a run shows while it goes on: of every log the metrics that move, with as many digits as it takes to see it."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm", "learning_rate")
MOST_DECIMALS = 9


class MetricText:
    """Logs as text. A loss gets the decimals in which it differs from the first one; the others, three digits."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}

    def __call__(self, logs: dict[str, Any], prefix: str = "") -> str:
        """The metrics of a log that are shown, on one line.

        Args:
            logs: by name, with the epoch if it is known.
            prefix: of the names, as eval_.
        """
        names = [prefix + name for name in SHOWN if isinstance(logs.get(prefix + name), float | int)]
        parts = [f"{name}={self._number(name, float(logs[name]))}" for name in names]
        if "epoch" in logs:
            parts.append(f"epoch={logs['epoch']:.2f}")
        return " ".join(parts)

    def _number(self, name: str, value: float) -> str:
        if name.endswith("accuracies"):
            return f"{value:.3f}"
        if not name.endswith("loss"):
            return f"{value:.3g}"
        moved = abs(value - self._first.setdefault(name, value))
        decimals = 3
        if moved > 0 and math.isfinite(moved):
            decimals = min(max(decimals, 1 - math.floor(math.log10(moved))), MOST_DECIMALS)
        return f"{value:.{decimals}f}"


class LiveProgress(ProgressCallback):
    """A progress bar with the last logged metrics at its end, and those of evaluations on lines of their own."""

    def __init__(self) -> None:
        super().__init__()
        self._text = MetricText()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show a log of training or of an evaluation."""
        if self.training_bar is None or logs is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(self._text(logs))
        elif "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: {self._text(logs, 'eval_')}")


def close_bars(trainer: Any) -> None:
    """Close the progress bars of a run that did not come to its end, so that what is said next is below them."""
    for callback in trainer.callback_handler.callbacks:
        for bar in (getattr(callback, "prediction_bar", None), getattr(callback, "training_bar", None)):
            if bar is not None:
                bar.close()


class LiveLines(TrainerCallback):
    """The same without a bar, a line a log."""

    def __init__(self) -> None:
        self._text = MetricText()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print a log of training or of an evaluation."""
        if logs is None or not state.is_local_process_zero or not {"loss", "eval_loss"} & logs.keys():
            return
        text = self._text(logs, "" if "loss" in logs else "eval_")
        print(f"step {state.global_step}/{state.max_steps}: {text}", flush=True)
