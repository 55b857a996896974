"""The options of `dil-train`: its own and every field of `DILConfig`, from the command line and from a YAML recipe."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments

from dil_kernels import __version__
from dil_kernels.backends import BACKEND_CHOICES
from dil_kernels.cli.class_options import lora_fields, plain_bnb_fields, plain_lora_fields
from dil_kernels.cli.option_names import as_on_command_line, help_width, option_string
from dil_kernels.cli.option_types import OptionField, fields_of, members_of, nonempty, type_options
from dil_kernels.cli.run_options import RunOptions, check_run_options, run_options
from dil_kernels.data.truncation import TRUNCATION_MODES
from dil_kernels.losses import divergence_names
from dil_kernels.losses.options import LINKS
from dil_kernels.recipes import find_recipe, packaged_recipes
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
    "bf16_full_eval",
    "fp16_full_eval",
    "batch_eval_metrics",
    "label_names",
    "label_smoothing_factor",
    "length_column_name",
    "remove_unused_columns",
}


def in_options(message: str) -> str:
    """A message on one line, with the options in it as the command line spells them."""
    names = [field.name for kind in (RunOptions, DILConfig) for field in dataclasses.fields(kind)]
    return as_on_command_line(message, [*names, *plain_lora_fields(), *plain_bnb_fields()])


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the option nearest to an unknown one."""

    source = ""  # where the options being parsed stand, for the messages
    nulls: dict[str, bool | None]  # what null in a recipe means, of options that have such a value

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.color = False  # in which argparse of Python 3.14 writes where the terminal takes it
        self.register("type", None, nonempty)  # of options that are text
        self.nulls = dict.fromkeys(REQUIRED)

    def add_field(self, group: argparse._ArgumentGroup, name: str, field: OptionField, text: str) -> None:
        """Add an option to a group.

        Args:
            group: of this parser.
            name: of the option, with underscores.
            field: that it sets.
            text: its help.
        """
        names = dict.fromkeys([name, *(other for pair in RENAMED.items() if name in pair for other in pair)])
        keywords = {**type_options(field.hint, field.keywords.get("choices")), **field.keywords}
        group.add_argument(*map(option_string, names), dest=name, help=text.replace("%", "%%"), **keywords)
        if type(None) in members_of(field.hint):
            self.nulls[name] = None
        elif field.default is False:
            self.nulls[name] = False

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {self.source}{' '.join(message.split())}\n")

    def parse_known(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse options, of which ``--max_steps`` and ``--max-steps`` are the same.

        Raises:
            SystemExit: with status 2, an unknown option or a bad value, or one that stands twice.
        """
        tokens = [_dashed_option(token) for token in argv]
        self._refuse_repeated(tokens)
        namespace, unknown = self.parse_known_args(tokens)
        if unknown:
            option = next((token for token in unknown if token.startswith("-")), unknown[0]).split("=")[0]
            if not option.startswith("-"):
                self.error(f"unexpected argument {option!r}; data are given as --train-file")
            self.error(f"unknown option {option}{_hint(option, self._option_string_actions, option_string)}")
        return namespace

    def _refuse_repeated(self, tokens: Sequence[str]) -> None:
        dests: set[str] = set()
        for token in tokens:
            option = token.split("=")[0]
            action = self._option_string_actions.get(option)
            if action is None or action.dest in ("import_modules", "help", "version"):
                continue
            if action.dest in dests:
                more = "; several go behind one" if action.nargs == "+" else ""
                self.error(f"{option} stands twice, and only one value would be read{more}")
            dests.add(action.dest)


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
        if action.dest not in ("help", "version", "config")
        for option in action.option_strings
    }
    values: dict[str, Any] = {}
    tokens: list[str] = []
    names: dict[str, Any] = {}
    for key, value in recipe.items():
        option = _underscored(str(key))
        if option not in actions:
            parser.error(f"unknown option {key!r}{_hint(option, actions, repr)}")
        dest = actions[option].dest
        if dest in names:
            parser.error(f"{names[dest]!r} and {key!r} are one option")
        names[dest] = key
        if value is None:
            if dest not in parser.nulls:
                parser.error(f"option {key!r} cannot be null; leave it out for its default")
            values[dest] = parser.nulls[dest]
        elif isinstance(value, list) and not value:
            parser.error(f"option {key!r}: the list is empty")
        elif isinstance(value, list) and actions[option].nargs != "+":
            parser.error(f"option {key!r} takes one value, got a list")
        else:
            # An unquoted `no` is a boolean in YAML.
            is_no = value is False and "no" in (actions[option].choices or ())
            value = "no" if is_no else value
            is_text = actions[option].type is None and actions[option].nargs != 0
            for item in (value if isinstance(value, list) else [value]) if is_text else ():
                if not isinstance(item, str | dict):
                    parser.error(f"option {key!r} is text, but YAML reads {item!r} there: quote it")
            tokens += _as_tokens(option, value)
    values.update(vars(parser.parse_args(tokens)))
    parser.source = ""
    return values


def _hint(option: str, known: Iterable[str], spelled: Callable[[str], str]) -> str:
    """To be said of an unknown option: which one may be meant, or that it may be of peft, which is not installed."""
    option = _underscored(option)
    without_peft = option.startswith(("lora_", "use_")) and not lora_fields()
    is_of_lora = without_peft and option.startswith("lora_")
    nearest = None if is_of_lora else did_you_mean(option, map(_underscored, known))
    hint = f"; did you mean {spelled(nearest)}?" if nearest else ""
    return hint + ("; options of LoRA need peft: pip install peft" if without_peft else "")


def _repeated_key(node: yaml.Node | None) -> str | None:
    """A key that stands twice in a mapping of a YAML document, of which only the last one would be read."""
    if not isinstance(node, yaml.CollectionNode):
        return None
    keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    nodes = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else node.value
    twice = (key for index, key in enumerate(keys) if isinstance(key, str) and key != "<<" and key in keys[:index])
    return next(filter(None, (*twice, *map(_repeated_key, nodes))), None)


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
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=help_width()),
        usage="dil-train --model MODEL --train-file FILE --output-dir DIR [options]\n"
        "       dil-train --config RECIPE.yaml [options]",
    )
    parser.add_argument("--version", action="version", version=f"dil_kernels {__version__}")
    group = parser.add_argument_group("model, data and output")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="YAML recipe of any of these options, which the command line overrides; or one of the package's: "
        + ", ".join(packaged_recipes()),
    )
    group.add_argument(
        "--import",
        dest="import_modules",
        action="append",
        metavar="MODULE",
        help="import a Python module first, such as one that calls register_divergence; may be repeated",
    )
    group.add_argument("--output-dir", metavar="DIR", help="where checkpoints, model, table and plot are written")
    for name, field in fields_of(RunOptions).items():
        if field.help:
            parser.add_field(group, name, field, field.help)
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    omitted = OMITTED_FIELDS | {old for old, new in RENAMED.items() if new in inherited}
    fields = {name: field for name, field in fields_of(DILConfig).items() if name not in omitted}
    for name, choices in _choices().items():
        fields[name] = dataclasses.replace(fields[name], keywords={"choices": choices, "metavar": None})
    lora, bnb = plain_lora_fields(), plain_bnb_fields()
    own = {name: field for name, field in fields.items() if name not in inherited}
    common = {name: fields[name] for name in COMMON_FIELDS if name in fields}
    others = {name: field for name, field in fields.items() if name not in {*own, *common}}
    for title, members, brief in (
        ("LoRA: fields of peft.LoraConfig (all of them: --lora-kwargs)", lora, True),
        ("quantisation: arguments of transformers.BitsAndBytesConfig (all: --bnb-kwargs)", bnb, True),
        ("Direct Imitation Learning", own, False),
        ("training", common, True),
        ("further options of transformers.TrainingArguments", others, True),
    ):
        group = parser.add_argument_group(title)
        for name, field in members.items():
            parser.add_field(group, name, field, _describe(field, brief))
    parser.nulls |= dict.fromkeys([*lora, *bnb])  # as if they were not given
    return parser


def _describe(field: OptionField, brief: bool) -> str:
    """The help of a field, of which the first sentence alone if brief, and its default."""
    text = re.split(r"(?<=[\w)`>][.!?])\s", field.help)[0] if brief else field.help
    default = field.default.value if isinstance(field.default, enum.Enum) else field.default
    return text if default is None else f"{text.rstrip('.')} (default: {default})".lstrip()


def _choices() -> dict[str, tuple[str, ...]]:
    return {
        "loss_type": tuple(divergence_names()),
        "link": LINKS,
        "backend": BACKEND_CHOICES,
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
