"""The options of `dil-train`: its own and every field of `DILConfig`, from the command line and from a YAML recipe."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import importlib
import json
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments

from dil_kernels.backends import BACKENDS
from dil_kernels.cli.class_options import lora_fields, plain_bnb_fields, plain_lora_fields
from dil_kernels.cli.option_names import as_on_command_line, option_string
from dil_kernels.cli.option_types import nonempty, type_options
from dil_kernels.cli.run_options import RunOptions, add_class_options, add_run_options, check_run_options, run_options
from dil_kernels.data.tokenization import TRUNCATION_MODES
from dil_kernels.losses.divergences import divergence_names
from dil_kernels.recipes import find_recipe
from dil_kernels.training.config import DILConfig
from dil_kernels.wording import describe_error, did_you_mean

REQUIRED = ("model", "train_file", "output_dir")
COMMON_FIELDS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "bf16",
    "activation_checkpointing",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "seed",
    "report_to",
)
# Options that transformers 5 renamed on its way: either name serves, whichever of the two is installed.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Declared by hand below, without an effect in this program, or not expressible as text.
OMITTED_FIELDS = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "do_train",
    "do_eval",
    "do_predict",
    "parallelism_config",
    "include_for_metrics",
    "batch_eval_metrics",
}


def in_options(message: str) -> str:
    """A message on one line, with the options in it as the command line spells them."""
    names = [field.name for kind in (RunOptions, DILConfig) for field in dataclasses.fields(kind)]
    return as_on_command_line(message, [*names, *plain_lora_fields(), *plain_bnb_fields()])


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the option nearest to an unknown one."""

    source = ""  # where the options being parsed stand, for the messages

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.color = False  # in which argparse of Python 3.14 writes where the terminal takes it
        self.register("type", None, nonempty)  # of options that are text

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {self.source}{' '.join(message.split())}\n")

    def parse_known(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse options, of which ``--max_steps`` and ``--max-steps`` are the same.

        Raises:
            SystemExit: with status 2, an unknown option or a bad value.
        """
        namespace, unknown = self.parse_known_args([_dashed_option(token) for token in argv])
        if unknown:
            option = next((token for token in unknown if token.startswith("-")), unknown[0]).split("=")[0]
            nearest = did_you_mean(_underscored(option), map(_underscored, self._option_string_actions))
            hint = f"; did you mean {option_string(nearest)}?" if nearest else ""
            self.error(f"unknown option {option}{hint}{_without_peft(option)}")
        return namespace


def parse_arguments(argv: Sequence[str]) -> tuple[RunOptions, DILConfig]:
    """The options of a run: a recipe's, where ``--config`` names one, overridden by the command line's.

    Raises:
        SystemExit: with status 2 and a line on stderr: an option is unknown, missing or bad; status 0 after --help.
    """
    modules = import_modules(argv)
    parser = build_parser()
    command_line = vars(parser.parse_known(argv))
    recipe = command_line.pop("config", None)
    values = {} if recipe is None else read_recipe(recipe, parser)
    values.update(command_line)
    given = {name for name, value in values.items() if value is not None}
    given |= {"train_file"} if "datasets" in given else set()
    missing = [option_string(name) for name in REQUIRED if name not in given]
    if missing:
        parser.error(f"{', '.join(missing)} must be given, here or in a recipe (--config)")
    try:
        run, others = run_options(values, modules)
        config = DILConfig(**others)
        check_run_options(run, config)
    except Exception as error:  # whatever transformers and accelerate raise of a value
        parser.error(in_options(describe_error(error)))
    return run, config


def import_modules(argv: Sequence[str]) -> tuple[str, ...]:
    """Import the modules that ``--import`` or a recipe names, before the choices of the other options are known.

    Raises:
        SystemExit: with status 2: one cannot be imported.
    """
    parser = Parser(prog="dil-train", add_help=False, allow_abbrev=False)
    parser.add_argument("--import", dest="modules", action="append", default=[])
    parser.add_argument("--config")
    given = parser.parse_known_args(list(argv))[0]
    names = [*_imports_of_recipe(given.config), *given.modules]
    sys.path.insert(0, "")  # as `python -m` has it: a module beside the caller
    try:
        for name in names:
            importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises
        parser.error(f"--import {name}: {type(error).__name__}: {error}")
    finally:
        sys.path.remove("")
    return tuple(names)


def _imports_of_recipe(name: str | None) -> list[str]:
    """What a recipe imports; what is wrong with the recipe is for `read_recipe` to say."""
    try:
        recipe = None if name is None else yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    names = recipe.get("import") if isinstance(recipe, dict) else None
    names = names if isinstance(names, list) else [] if names is None else [names]
    return [str(name) for name in names]


def read_recipe(name: str, parser: Parser) -> dict[str, Any]:
    """The options in a YAML file, checked and converted as the command line's.

    Args:
        name: a file, or a recipe of the package: one mapping of option names, with dashes or underscores, to values;
            null stands for None, and for false.
        parser: as of `build_parser`.

    Returns:
        Values by name, of those options that the file sets, but for ``import``: see `import_modules`.

    Raises:
        SystemExit: with status 2: the file cannot be read, or an option in it is unknown or bad.
    """
    parser.source = f"recipe {name}: "
    try:
        text = find_recipe(name).read_text(encoding="utf-8")
        recipe, twice = yaml.safe_load(text), _repeated_key(yaml.compose(text, yaml.SafeLoader))
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"cannot be read: {error}")
    except yaml.YAMLError as error:
        parser.error(f"broken YAML: {error}")
    if not isinstance(recipe, dict):
        parser.error(f"must be a mapping of options to values, got {type(recipe).__name__}")
    if twice is not None:
        parser.error(f"{twice!r} stands twice, and only one value would be read")
    recipe.pop("import", None)
    # By every name that the command line has for them.
    actions = {
        _underscored(option): action
        for action in parser._actions
        if action.dest not in ("help", "config")
        for option in action.option_strings
    }
    values: dict[str, Any] = {}
    tokens: list[str] = []
    names: dict[str, Any] = {}
    for key, value in recipe.items():
        option = _underscored(str(key))
        if option not in actions:
            nearest = did_you_mean(option, actions)
            hint = f"; did you mean {nearest!r}?" if nearest else ""
            parser.error(f"unknown option {key!r}{hint}{_without_peft(option)}")
        dest = actions[option].dest
        if dest in names:
            parser.error(f"{names[dest]!r} and {key!r} are one option")
        names[dest] = key
        if value is None:
            if dest in _null_values():
                values[dest] = _null_values()[dest]
            elif dest in _field_names():
                parser.error(f"option {key!r} cannot be null; leave it out for its default")
            else:  # of peft or bitsandbytes
                values[dest] = None
        elif isinstance(value, list) and not value:
            parser.error(f"option {key!r}: the list is empty")
        elif isinstance(value, list) and actions[option].nargs != "+":
            parser.error(f"option {key!r} takes one value, got a list")
        else:
            # An unquoted `no` is a boolean in YAML.
            is_no = value is False and "no" in (actions[option].choices or ())
            tokens += _as_tokens(option, "no" if is_no else value)
    values.update(vars(parser.parse_args(tokens)))
    parser.source = ""
    return values


def _without_peft(option: str) -> str:
    """To be said of an unknown option that may be a field of peft's, where peft is not installed."""
    of_lora = _underscored(option).startswith(("lora_", "use_")) and not lora_fields()
    return "; options of LoRA need peft: pip install peft" if of_lora else ""


def _repeated_key(node: yaml.Node | None) -> str | None:
    """A key that stands twice in a mapping of a YAML document, of which only the last one would be read."""
    if not isinstance(node, yaml.CollectionNode):
        return None
    keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    nodes = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else node.value
    twice = (key for index, key in enumerate(keys) if isinstance(key, str) and key != "<<" and key in keys[:index])
    return next(filter(None, (*twice, *map(_repeated_key, nodes))), None)


def _field_names() -> set[str]:
    return {field.name for kind in (DILConfig, RunOptions) for field in dataclasses.fields(kind)}


@functools.cache
def _null_values() -> dict[str, bool | None]:
    """What null in a recipe means: None where that is a value of the option, or nothing its default; or false."""
    found: dict[str, bool | None] = {}
    for kind in (DILConfig, RunOptions):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if type(None) in typing.get_args(hints[field.name]) or field.name in REQUIRED:
                found[field.name] = None
            elif field.default is False:
                found[field.name] = False
    return found


def _as_tokens(name: str, value: Any) -> list[str]:
    """The command line that sets an option to a value of a recipe."""
    if isinstance(value, list):
        return [option_string(name), *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)]
    if isinstance(value, dict):
        return [f"{option_string(name)}={json.dumps(value)}"]
    return [f"{option_string(name)}={value}"]


def build_parser() -> Parser:
    """The parser of `dil-train`. Options that are not given are left out of its result."""
    parser = Parser(
        prog="dil-train",
        description="Train a causal language model on preference pairs by Direct Imitation Learning (DIL).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=120),
        usage="dil-train --model MODEL --train-file FILE --output-dir DIR [options]\n"
        "       dil-train --config RECIPE.yaml [options]",
    )
    add_run_options(parser.add_argument_group("model, data and output"))
    add_class_options(parser)
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    omitted = OMITTED_FIELDS | {old for old, new in RENAMED.items() if new in inherited}
    fields = {field.name: field for field in dataclasses.fields(DILConfig) if field.name not in omitted}
    own = [name for name in fields if name not in inherited]
    common = [name for name in COMMON_FIELDS if name in fields]
    others = [name for name in fields if name not in {*own, *common}]
    hints = typing.get_type_hints(DILConfig)
    for title, names, brief in (
        ("Direct Imitation Learning", own, False),
        ("training", common, True),
        ("further options of transformers.TrainingArguments", others, True),
    ):
        group = parser.add_argument_group(title)
        for name in names:
            _add_field(group, fields[name], hints[name], brief)
    return parser


def _add_field(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], hint: Any, brief: bool) -> None:
    """Add an option for a field of `DILConfig`.

    Args:
        group: of options.
        field: with metadata help.
        hint: its resolved type.
        brief: show only the first sentence of its help.
    """
    options = type_options(hint, tuple(field.metadata.get("choices", ())) or None)
    if field.name in _choices():
        options = {"choices": _choices()[field.name]}
    text = " ".join(str(field.metadata.get("help", "")).split())
    if brief:
        text = re.split(r"(?<=[a-z)`][.!?])\s", text)[0]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    default = default.value if isinstance(default, enum.Enum) else default
    if default is not None:
        text = f"{text.rstrip('.')} (default: {default})"
    other_names = [option_string(other) for pair in RENAMED.items() if field.name in pair for other in pair]
    names = dict.fromkeys([option_string(field.name), *other_names])
    group.add_argument(*names, dest=field.name, help=text.replace("%", "%%"), **options)


def _choices() -> dict[str, tuple[str, ...]]:
    return {
        "loss_type": tuple(divergence_names()),
        "backend": ("auto", *BACKENDS),
        "truncation_mode": TRUNCATION_MODES,
        "include_num_input_tokens_seen": ("no", "all", "non_padding"),
    }


def _underscored(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _dashed_option(token: str) -> str:
    """``--max_steps=1`` as ``--max-steps=1``; a value as it is."""
    if not token.startswith("--"):
        return token
    option, separator, value = token.partition("=")
    return option.replace("_", "-") + separator + value
