"""The options of `dil-train` beside its `DILConfig`: model, adapters, quantisation, data and output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dil_kernels.cli.class_options import lora_config, plain_bnb_fields, plain_lora_fields, quantization_config
from dil_kernels.cli.option_names import option_string
from dil_kernels.cli.option_types import checkpoint, json_object
from dil_kernels.data.loading import is_local_file
from dil_kernels.data.mixture import data_sources
from dil_kernels.training.config import DILConfig
from dil_kernels.training.ranges import check_numbers

DTYPES = ("float32", "bfloat16", "float16", "auto")
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


def _option(text: str, default: Any = None, **keywords: Any) -> Any:
    """A field that is an option.

    Args:
        text: its help.
        default: without it.
        keywords: of `add_argument`, beside those that the type asks for.
    """
    return dataclasses.field(default=default, metadata={"help": text, **keywords})


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What `dil-train` needs beside its `DILConfig`.

    Attributes:
        import_modules: that were imported first.
        lora_options: options by name that are fields of `peft.LoraConfig`.
        bnb_options: options by name that are arguments of `transformers.BitsAndBytesConfig`.
    """

    model: str = _option(
        "the model to train: a directory, or a name on the hub", default=dataclasses.MISSING, metavar="NAME"
    )
    train_file: str | None = _option(
        "preference pairs (prompt, chosen, rejected) or single responses (prompt, completion, label): a .jsonl, .json, "
        ".csv (each also .gz) or .parquet file, or a data set on the hub",
        metavar="FILE",
    )
    eval_file: str | None = _option("held-out pairs for the before/after table; likewise", metavar="FILE")
    overwrite_output_dir: bool = _option(
        "write into a directory that holds something: what will be overwritten is named, checkpoints and reports of an "
        "earlier run are removed when training begins, and its model when the new one is saved",
        default=False,
    )
    train_split: str = _option("split of a hub data set to train on (default: train)", default="train", metavar="NAME")
    eval_split: str | None = _option(
        "split of a hub data set to evaluate on (default: test; train of a file)", metavar="NAME"
    )
    dataset_config: str | None = _option(
        "configuration of the hub data sets of --train-file and --eval-file", metavar="NAME"
    )
    datasets: tuple[dict[str, Any], ...] = _option(
        "train on several data sets in place of --train-file; in a recipe, a list of mappings: path, and if need be "
        "name, data_dir, data_files, split and fraction (its share of the rows, of all of them or of none)",
        default=(),
        type=json_object,
        metavar="JSON",
    )
    test_split_size: float | None = _option(
        "hold out this share of the training data, or from 1 on this many rows, in place of --eval-file"
    )
    ref_model: str | None = _option("the reference model (default: the model as it is before training)", metavar="NAME")
    dtype: str = _option(
        "precision of the weights (default: float32, which small learning rates need; see --bf16 for the rest)",
        default="float32",
        choices=DTYPES,
    )
    attn_implementation: str | None = _option("attention of transformers, e.g. flash_attention_2", metavar="NAME")
    model_revision: str | None = _option(
        "branch, tag or commit of --model on the hub, and of its tokenizer", metavar="NAME"
    )
    trust_remote_code: bool = _option("run the code that models and tokenizer bring along", default=False)
    model_init_kwargs: Mapping[str, Any] | None = _option(
        "further arguments of from_pretrained, for --model and --ref-model, such as fields of their config"
    )
    pad_token: str | None = _option("token of the tokenizer to pad with (default: its own, or its EOS)")
    chat_template_path: str | None = _option(
        "file of a Jinja chat template to use in place of the tokenizer's", metavar="FILE"
    )
    lora_rank: int | None = _option("train LoRA adapters of this rank (needs peft; default: all weights)")
    lora_alpha: float | None = _option("scale of LoRA (default: twice the rank)")
    lora_target_modules: tuple[str, ...] = _option(
        "layers that LoRA adapts (default: all-linear, every linear layer but the output head)",
        default=("all-linear",),
    )
    lora_kwargs: Mapping[str, Any] | None = _option("fields of peft.LoraConfig, by their names there")
    load_in_4bit: bool = _option("hold the base weights in 4 bits, in NF4 of bitsandbytes, under LoRA", default=False)
    load_in_8bit: bool = _option("hold them in 8 bits", default=False)
    bnb_kwargs: Mapping[str, Any] | None = _option("arguments of transformers.BitsAndBytesConfig, by their names there")
    resume_from_checkpoint: str | bool = _option(
        "continue from this checkpoint, or without DIR from the last complete one in --output-dir",
        default=False,
        type=checkpoint,
        metavar="DIR",
        nargs="?",
        const=True,
    )
    traceback: bool = _option("show where an error arose, for a report of it", default=False)
    import_modules: tuple[str, ...] = ()
    lora_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bnb_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def has_eval(self) -> bool:
        """Whether anything is held out."""
        return self.eval_file is not None or self.test_split_size is not None

    def given(self) -> dict[str, Any]:
        """The options that are not left at their defaults, by their names in a recipe."""
        kept: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("lora_options", "bnb_options"):
                kept |= value
            elif value != field.default:
                name = "import" if field.name == "import_modules" else field.name
                kept[name] = list(value) if isinstance(value, tuple) else value
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
    own: dict[str, Any] = {name: value for name, value in values.items() if name in fields}
    own |= {name: tuple(value) for name, value in own.items() if isinstance(value, list)}
    for of_class, names in (("lora_options", lora), ("bnb_options", bnb)):
        own[of_class] = {name: values[name] for name in names if values.get(name) is not None}
    others = {name: value for name, value in values.items() if name not in {*fields, *lora, *bnb}}
    return RunOptions(**{**own, "import_modules": modules}), others


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
    if run.eval_split is not None and run.eval_file is None:
        raise ValueError(f"--eval-split {run.eval_split} was given, but no --eval-file that has it")
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
