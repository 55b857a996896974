"""The ranges in which the numbers among a run's options lie."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

LARGEST_INT = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`.

    Attributes:
        least: belongs to the range, unless `above`.
        most: belongs to the range, unless `below`.
        above: whether least is left out.
        below: whether most is left out.
        other: a number beside them that has a meaning of its own.
        note: what to give instead of other numbers.
    """

    least: float = -math.inf
    most: float = LARGEST_INT
    above: bool = False
    below: bool = False
    other: int | None = None
    note: str = ""

    def __contains__(self, value: float) -> bool:
        if value == self.other:
            return True
        low = self.least < value if self.above else self.least <= value
        high = value < self.most if self.below else value <= self.most
        return math.isfinite(value) and low and high

    def __str__(self) -> str:
        parts = [] if self.other is None else [f"{self.other}, or"]
        if math.isfinite(self.least):
            parts.append(f"{'above' if self.above else 'at least'} {self.least:g}")
        if self.most < LARGEST_INT:
            parts += ["and"] * bool(parts) + [f"{'below' if self.below else 'at most'} {self.most:.10g}"]
        return (" ".join(parts) or "a finite number") + (f" ({self.note})" if self.note else "")


COUNT, POSITIVE, NOT_NEGATIVE = Range(1), Range(0, above=True), Range(0)
SEED = Range(0, 2**32 - 1)  # what NumPy takes
RANGES = {
    "learning_rate": Range(0, 1e4),
    "num_train_epochs": Range(0, 1e9, above=True),
    "max_steps": Range(1, other=-1),
    "per_device_train_batch_size": Range(1, 2**31),
    "per_device_eval_batch_size": Range(1, 2**31),
    "gradient_accumulation_steps": Range(1, 2**31),
    "warmup_steps": NOT_NEGATIVE,
    "warmup_ratio": Range(0, 1),
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": Range(0, 1, below=True),
    "adam_beta2": Range(0, 1, below=True),
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "logging_steps": NOT_NEGATIVE,
    "eval_steps": NOT_NEGATIVE,
    "eval_delay": NOT_NEGATIVE,
    "eval_accumulation_steps": COUNT,
    "save_steps": POSITIVE,
    "save_total_limit": Range(
        1, note="1 keeps the last checkpoint alone, save_total_limit=None all; save_strategy='no' writes none"
    ),
    "seed": SEED,
    "data_seed": SEED,
    "torch_empty_cache_steps": COUNT,
    "dataloader_num_workers": Range(0, 2**15),
    "dataloader_prefetch_factor": COUNT,
    "dataset_num_proc": Range(1, 2**15),
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": Range(1, 10**9),
    "local_rank": Range(-1),
    "stash_bytes": NOT_NEGATIVE,
    "max_length": Range(2),  # a token of prompt and one of response
    "num_generations_at_eval": NOT_NEGATIVE,
    "generate_max_new_tokens": COUNT,
    "lora_rank": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": Range(0, 1, below=True),
    "lora_qalora_group_size": COUNT,
    "llm_int8_threshold": NOT_NEGATIVE,
    "test_split_size": POSITIVE,
    "precompute_ref_batch_size": Range(1, 2**31),
    "max_tokens_per_batch": COUNT,
    "pad_to_multiple_of": Range(1, 2**15),
    "ref_model_mixup_alpha": Range(0, 1, above=True),
    "ref_model_sync_steps": COUNT,
}


def check_numbers(options: Any) -> None:
    """Check the numbers among the fields of a dataclass; those without a range of their own must be finite.

    Raises:
        ValueError: names the field, its range and the value.
    """
    for field in dataclasses.fields(options):
        check_number(field.name, getattr(options, field.name, None))


def check_number(name: str, value: Any) -> None:
    """Check the value of an option, if it is a number.

    Raises:
        ValueError: names the option, its range and the value.
    """
    allowed = RANGES.get(name, Range())
    if isinstance(value, int | float) and not isinstance(value, bool) and value not in allowed:
        raise ValueError(f"{name} must be {allowed}, got {value}")
