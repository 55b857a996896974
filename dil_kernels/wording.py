"""What errors say: what to install, which name an unknown one may have meant, and an error on one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names that TRL, LLaMA-Factory and axolotl have for options of ours; by their letters, other options are nearer.
ELSEWHERE = {
    "base_model": "model",
    "cutoff_len": "max_length",
    "dataset": "train_file",
    "dataset_name": "train_file",
    "bnb_4bit_compute_dtype": "bnb_kwargs",
    "bnb_4bit_quant_storage": "bnb_kwargs",
    "chat_template": "chat_template_path",
    "dataset_test_split": "eval_split",
    "dataset_train_split": "train_split",
    "eval_dataset": "eval_file",
    "flash_attn": "attn_implementation",
    "lora_r": "lora_rank",
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
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    "use_peft": "lora_rank",
}


def needs_extra(what: str, extra: str, error: ImportError) -> str:
    """What to install where a package is missing."""
    return f"{what} needs the extra [{extra}]: pip install 'dil-kernels[{extra}]', in a clone '.[{extra}]' ({error})"


def did_you_mean(option: str, known: Iterable[str]) -> str | None:
    """The option that is meant by an unknown one: by its name elsewhere, else the nearest; None if none is near.

    Args:
        option: with underscores.
        known: likewise.
    """
    return ELSEWHERE.get(option) or next(iter(difflib.get_close_matches(option, list(known), n=1)), None)


def describe_error(error: BaseException) -> str:
    """What an error says, on one line: of a file its path and the reason, without a number of the system."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    message = " ".join(str(error).split())
    expected = isinstance(error, OSError | ValueError | ImportError | NotImplementedError | FloatingPointError)
    return message if message and expected else f"{type(error).__name__}: {message}".removesuffix(": ")
