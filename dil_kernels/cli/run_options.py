"""The options of `dil-train` beside its `DILConfig`: model, adapters, quantisation, data and output."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dil_kernels.cli.class_options import (
    QUANT_TYPES,
    lora_config,
    plain_bnb_fields,
    plain_lora_fields,
    quantization_config,
)
from dil_kernels.cli.option_names import option_string
from dil_kernels.cli.option_types import boolean, checkpoint, json_object, type_options
from dil_kernels.data.loading import is_local_file
from dil_kernels.data.mixture import data_sources
from dil_kernels.recipes import packaged_recipes
from dil_kernels.training.config import DILConfig
from dil_kernels.training.ranges import check_numbers

DTYPES = ("float32", "bfloat16", "float16", "auto")
BOOL: dict[str, Any] = {"metavar": "BOOL", "type": boolean, "nargs": "?", "const": True}
JSON: dict[str, Any] = {"metavar": "JSON", "type": json_object}
# Arguments of `from_pretrained` that have an option of their own.
MODEL_INIT_ELSEWHERE = {
    "attn_implementation": "attn_implementation",
    "dtype": "dtype",
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
    "quantization_config": "bnb_kwargs",
    "revision": "model_revision",
    "torch_dtype": "dtype",
    "trust_remote_code": "trust_remote_code",
}


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What `dil-train` needs beside its `DILConfig`.

    Attributes:
        lora_options: options by name that are fields of `peft.LoraConfig`.
        bnb_options: options by name that are arguments of `transformers.BitsAndBytesConfig`.
    """

    model: str
    train_file: str | None = None
    eval_file: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    dataset_config: str | None = None
    datasets: tuple[dict[str, Any], ...] = ()
    test_split_size: float | None = None
    ref_model: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    model_revision: str | None = None
    trust_remote_code: bool = False
    model_init_kwargs: dict[str, Any] | None = None
    pad_token: str | None = None
    chat_template_path: str | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    lora_kwargs: dict[str, Any] | None = None
    lora_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_kwargs: dict[str, Any] | None = None
    bnb_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resume_from_checkpoint: str | bool = False
    import_modules: tuple[str, ...] = ()
    overwrite_output_dir: bool = False
    traceback: bool = False

    @property
    def has_eval(self) -> bool:
        """Whether anything is held out."""
        return self.eval_file is not None or self.test_split_size is not None

    def given(self) -> dict[str, Any]:
        """The options that are not left at their defaults, by name."""
        kept: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("lora_options", "bnb_options"):
                kept |= value
            elif value != field.default:
                kept[field.name] = list(value) if isinstance(value, tuple) else value
        return kept

    def lora_config(self) -> Any:
        """The `peft.LoraConfig`; None without LoRA."""
        if self.lora_rank is None:
            return None
        return lora_config(
            self.lora_rank,
            self.lora_alpha,
            self.lora_target_modules,
            lora_kwargs=self.lora_kwargs,
            **self.lora_options,
        )

    def quantization_config(self) -> Any:
        """The `transformers.BitsAndBytesConfig`; None without quantisation."""
        return quantization_config(
            self.load_in_4bit, self.load_in_8bit, self.dtype, bnb_kwargs=self.bnb_kwargs, **self.bnb_options
        )


def run_options(values: Mapping[str, Any], modules: tuple[str, ...]) -> tuple[RunOptions, dict[str, Any]]:
    """The options of a run, and those that are left for `DILConfig`.

    Args:
        values: as given, by name.
        modules: that were imported.
    """
    fields = [field.name for field in dataclasses.fields(RunOptions)]
    lora, bnb = plain_lora_fields(), plain_bnb_fields()
    own = {name: value for name, value in values.items() if name in fields}
    own["datasets"] = tuple(own.get("datasets") or ())
    own["lora_target_modules"] = tuple(own.get("lora_target_modules") or RunOptions.lora_target_modules)
    run = RunOptions(
        **{
            **own,
            "import_modules": modules,
            "lora_options": {name: value for name, value in values.items() if name in lora and value is not None},
            "bnb_options": {name: value for name, value in values.items() if name in bnb and value is not None},
        }
    )
    return run, {name: value for name, value in values.items() if name not in {*fields, *lora, *bnb}}


def check_run_options(run: RunOptions, config: DILConfig) -> None:
    """Refuse options that do not fit each other or the classes behind them.

    Raises:
        ValueError: names the options.
    """
    check_numbers(run)
    _check_data(run, config)
    _check_model(run)
    of_lora = [name for name in run.given() if name.startswith("lora_") or name in run.lora_options]
    if run.lora_rank is None and of_lora:
        raise ValueError(f"{', '.join(map(option_string, of_lora))}: needs --lora-rank")
    for name in ("load_in_4bit", "load_in_8bit"):
        if run.lora_rank is None and getattr(run, name):
            raise ValueError(f"{option_string(name)} needs --lora-rank: weights in {name[8]} bits cannot be trained")
    adapters = run.lora_config()
    if adapters is not None and adapters.lora_dropout and config.disable_dropout:
        raise ValueError(
            f"lora_dropout={adapters.lora_dropout} was given, but disable_dropout=True, the default, switches it off"
        )
    run.quantization_config()


def _check_data(run: RunOptions, config: DILConfig) -> None:
    if run.datasets:
        for name in ("train_file", "train_split", "dataset_config"):
            if name in run.given():
                raise ValueError(f"{option_string(name)} was given, and --datasets, too, which says it for each set")
        data_sources(run.datasets)
    files = [name for name in (run.train_file, run.eval_file) if name is not None]
    if run.dataset_config is not None and all(map(is_local_file, files)):
        raise ValueError(f"dataset_config={run.dataset_config} was given, but {', '.join(files)} is no hub data set")
    size = run.test_split_size
    if size is not None and run.eval_file is not None:
        raise ValueError("test_split_size was given, and eval_file, too: choose what is held out")
    if size is not None and size >= 1 and size != int(size):
        raise ValueError(f"test_split_size must be a share below 1 or a whole number of rows, got {size:g}")
    if not run.has_eval and config.eval_strategy != "no":
        strategy = getattr(config.eval_strategy, "value", config.eval_strategy)
        raise ValueError(f"--eval-strategy {strategy} needs --eval-file or --test-split-size")
    if not run.has_eval and config.num_generations_at_eval:
        raise ValueError("--num-generations-at-eval needs --eval-file or --test-split-size")


def _check_model(run: RunOptions) -> None:
    for name in run.model_init_kwargs or {}:
        if name in MODEL_INIT_ELSEWHERE:
            raise ValueError(f"--model-init-kwargs: {name!r} is the option {option_string(MODEL_INIT_ELSEWHERE[name])}")
    if run.model_revision is not None and Path(run.model).exists():
        raise ValueError(f"model_revision={run.model_revision} was given, but {run.model} is a local directory")
    if run.chat_template_path is not None:
        read_chat_template(run.chat_template_path)


def read_chat_template(path: str) -> str:
    """The text of a chat template.

    Raises:
        ValueError: it cannot be read, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8: {error.reason}"
        raise ValueError(f"--chat-template-path {path}: {reason}") from error
    if not text.strip():
        raise ValueError(f"--chat-template-path {path}: the file is empty")
    return text


def add_class_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are fields of classes of peft and transformers."""
    for title, fields in (
        ("LoRA: fields of peft.LoraConfig (all of them: --lora-kwargs)", plain_lora_fields()),
        ("quantisation: arguments of transformers.BitsAndBytesConfig (all: --bnb-kwargs)", plain_bnb_fields()),
    ):
        group = parser.add_argument_group(title)
        for option, field in fields.items():
            choices = QUANT_TYPES if field.name == "bnb_4bit_quant_type" else None
            text = " ".join(field.help.split()).partition(". ")[0]
            default = QUANT_TYPES[0] if choices else field.default
            text += "" if default is None else f" (default: {default})"
            group.add_argument(
                option_string(option), help=text.strip().replace("%", "%%"), **type_options(field.hint, choices)
            )


def add_run_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of `RunOptions`."""
    add = group.add_argument
    add(
        "--config",
        metavar="FILE",
        help="YAML recipe of any of these options, which the command line overrides; or one of the package's: "
        + ", ".join(packaged_recipes()),
    )
    add(
        "--import",
        dest="import_modules",
        action="append",
        metavar="MODULE",
        help="import a Python module first, such as one that calls register_divergence; may be repeated",
    )
    add("--model", metavar="NAME", help="the model to train: a directory, or a name on the hub")
    add(
        "--train-file",
        metavar="FILE",
        help="preference pairs (prompt, chosen, rejected) or single responses (prompt, completion, label): a .jsonl, "
        ".json, .csv (each also .gz) or .parquet file, or a data set on the hub",
    )
    add("--eval-file", metavar="FILE", help="held-out pairs for the before/after table; likewise")
    add("--output-dir", metavar="DIR", help="where checkpoints, model, table and plot are written")
    add(
        "--overwrite-output-dir",
        **BOOL,
        help="write into a directory that holds something: what will be overwritten is named, and checkpoints of an "
        "earlier run are removed when training begins",
    )
    add("--train-split", metavar="NAME", help="split of a hub data set to train on (default: train)")
    add(
        "--eval-split",
        metavar="NAME",
        help="split of a hub data set to evaluate on (default: test; train of a file)",
    )
    add("--dataset-config", metavar="NAME", help="configuration of the hub data sets of --train-file and --eval-file")
    add(
        "--datasets",
        **{**JSON, "nargs": "+"},
        help="train on several data sets in place of --train-file; in a recipe, a list of mappings: path, and if need "
        "be name, data_dir, data_files, split and fraction (its share of the rows, of all of them or of none)",
    )
    add(
        "--test-split-size",
        metavar="FLOAT",
        type=float,
        help="hold out this share of the training data, or from 1 on this many rows, in place of --eval-file",
    )
    add("--ref-model", metavar="NAME", help="the reference model (default: the model as it is before training)")
    add(
        "--dtype",
        choices=DTYPES,
        help="precision of the weights (default: float32, which small learning rates need; see --bf16 for the rest)",
    )
    add("--attn-implementation", metavar="NAME", help="attention of transformers, e.g. flash_attention_2")
    add("--model-revision", metavar="NAME", help="branch, tag or commit of --model on the hub, and of its tokenizer")
    add("--trust-remote-code", **BOOL, help="run the code that models and tokenizer bring along")
    add(
        "--model-init-kwargs",
        **JSON,
        help="further arguments of from_pretrained, for --model and --ref-model, such as fields of their config",
    )
    add("--pad-token", metavar="TEXT", help="token of the tokenizer to pad with (default: its own, or its EOS)")
    add("--chat-template-path", metavar="FILE", help="file of a Jinja chat template to use in place of the tokenizer's")
    add(
        "--lora-rank",
        metavar="INT",
        type=int,
        help="train LoRA adapters of this rank (needs peft; default: all weights)",
    )
    add("--lora-alpha", metavar="FLOAT", type=float, help="scale of LoRA (default: twice the rank)")
    add(
        "--lora-target-modules",
        metavar="NAME",
        nargs="+",
        help="layers that LoRA adapts (default: all-linear, every linear layer but the output head)",
    )
    add("--lora-kwargs", **JSON, help="fields of peft.LoraConfig, by their names there")
    add("--load-in-4bit", **BOOL, help="hold the base weights in 4 bits, in NF4 of bitsandbytes, under LoRA")
    add("--load-in-8bit", **BOOL, help="hold them in 8 bits")
    add("--bnb-kwargs", **JSON, help="arguments of transformers.BitsAndBytesConfig, by their names there")
    add(
        "--resume-from-checkpoint",
        metavar="DIR",
        nargs="?",
        const=True,
        type=checkpoint,
        help="continue from this checkpoint, or without DIR from the last complete one in --output-dir",
    )
    add("--traceback", **BOOL, help="show where an error arose, for a report of it")
