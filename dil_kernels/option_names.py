"""The names of options: what an unknown one may have meant, and how the command line spells those of a message."""

from __future__ import annotations

import difflib
import re
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


def did_you_mean(option: str, known: Iterable[str]) -> str | None:
    """The option that is meant by an unknown one: by its name elsewhere, else the nearest; None if none is near.

    Args:
        option: with underscores.
        known: likewise.
    """
    return ELSEWHERE.get(option) or next(iter(difflib.get_close_matches(option, list(known), n=1)), None)


def option_string(name: str) -> str:
    """The option of a field: ``--max-steps`` of ``max_steps``."""
    return "--" + name.replace("_", "-")


def as_on_command_line(message: str, fields: Iterable[str]) -> str:
    """A message on one line that names options as the command line does: ``--max-length none`` for ``max_length=None``.

    Args:
        message: of an error, written for callers from Python.
        fields: the names of the options; without a value beside them, only those of several words, or followed by
            "must", are taken for one.
    """
    names = "|".join(sorted(map(re.escape, fields), key=len, reverse=True))
    # Neither in paths nor in quotes nor in a longer name.
    named = re.compile(rf"(?<![\w./'\"-])(`|--|args\.)?({names})(?:=('[^']*'|[^\s,;:()`]+))?(`)?(?![\w/'\"=]|[.-]\w)")

    def spell(match: re.Match[str]) -> str:
        mark, name, value, _ = match.groups()
        if value is not None:
            plain = value.strip("'")
            return f"{option_string(name)} {plain.lower() if plain in ('None', 'True', 'False') else plain}"
        subject = match.string.startswith(" must ", match.end())
        return option_string(name) if mark or "_" in name or subject else match[0]

    return named.sub(spell, " ".join(message.split()))


def describe_error(error: BaseException) -> str:
    """What an error says, on one line: of a file its path and the reason, without a number of the system."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    message = " ".join(str(error).split())
    expected = isinstance(error, OSError | ValueError | ImportError | NotImplementedError | FloatingPointError)
    return message if message and expected else f"{type(error).__name__}: {message}".removesuffix(": ")
