"""What an unknown option of `dil-train` may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names that TRL, LLaMA-Factory and axolotl have for options of ours; by their letters, other options are nearer.
ELSEWHERE = {
    "base_model": "model",
    "cutoff_len": "max_length",
    "dataset": "train_file",
    "dataset_name": "train_file",
    "dataset_test_split": "eval_split",
    "dataset_train_split": "train_split",
    "eval_dataset": "eval_file",
    "flash_attn": "attn_implementation",
    "lora_target": "lora_target_modules",
    "micro_batch_size": "per_device_train_batch_size",
    "model_name_or_path": "model",
    "per_device_batch_size": "per_device_train_batch_size",
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "quantization_bit": "load_in_4bit",
    "ref_model_name_or_path": "ref_model",
    "sequence_len": "max_length",
    "torch_dtype": "dtype",
    "use_peft": "lora_rank",
}


def did_you_mean(option: str, known: Iterable[str]) -> str | None:
    """The option that is meant by an unknown one: by its name elsewhere, else the nearest; None if none is near.

    Args:
        option: with underscores.
        known: likewise.
    """
    return ELSEWHERE.get(option) or next(iter(difflib.get_close_matches(option, list(known), n=1)), None)
