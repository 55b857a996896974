"""Options of adapters and of quantisation: the fields of the classes of peft and transformers, whatever they are.

Fields of a plain kind are options of their own, by TRL's names where it has them; all may be given as one mapping.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from dil_kernels.cli.option_names import option_string
from dil_kernels.cli.option_types import OptionField, fields_of, members_of
from dil_kernels.training.ranges import check_number
from dil_kernels.wording import describe_error, did_you_mean

PLAIN = (bool, int, float, list[str])
# Fields that `dil-train` sets by options of its own.
LORA_ELSEWHERE = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "target_modules": "lora_target_modules",
}
BNB_ELSEWHERE = {"load_in_4bit": "load_in_4bit", "load_in_8bit": "load_in_8bit"}
OF_4_BITS, OF_8_BITS = "bnb_4bit_", ("llm_int8_threshold", "llm_int8_has_fp16_weight")
QUANT_TYPES = ("nf4", "fp4")


def lora_fields() -> dict[str, OptionField]:
    """The fields of `peft.LoraConfig` by the names of their options; none without peft.

    An option is named as its field if that begins with lora_ or use_, else lora_ comes before it.
    """
    if importlib.util.find_spec("peft") is None:
        return {}
    import peft

    inherited = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    fields = {name: field for name, field in fields_of(peft.LoraConfig).items() if name not in inherited}
    found = {}
    for name, field in fields.items():
        option = name if name.startswith(("lora_", "use_")) else f"lora_{name}"
        found[name if option in fields else option] = field  # `bias`, beside which there is `lora_bias`
    return found


def bnb_fields() -> dict[str, OptionField]:
    """The arguments of `transformers.BitsAndBytesConfig` by the names of their options, which are their own."""
    from transformers import BitsAndBytesConfig

    found = {
        name: OptionField(name, Any if argument.default is None else type(argument.default), argument.default)
        for name, argument in inspect.signature(BitsAndBytesConfig).parameters.items()
        if argument.kind is not argument.VAR_KEYWORD
    }
    kind = "bnb_4bit_quant_type"
    return {**found, kind: dataclasses.replace(found[kind], default=QUANT_TYPES[0], keywords={"choices": QUANT_TYPES})}


def plain_lora_fields() -> dict[str, OptionField]:
    """Those fields of LoRA that are options of their own."""
    return {
        option: field
        for option, field in lora_fields().items()
        if field.name not in LORA_ELSEWHERE and _is_plain(field.hint)
    }


def _is_plain(hint: Any) -> bool:
    kinds = [member for member in members_of(hint) if member is not type(None)]
    return len(kinds) == 1 and kinds[0] in PLAIN


def plain_bnb_fields() -> dict[str, OptionField]:
    """Those of quantisation that are."""
    return {
        option: field
        for option, field in bnb_fields().items()
        if field.name not in BNB_ELSEWHERE and field.hint in (bool, int, float, str)
    }


def lora_config(rank: int, alpha: float | None, target_modules: Sequence[str], **given: Any) -> Any:
    """The `peft.LoraConfig` of a run.

    Args:
        rank: of the adapters.
        alpha: scale; twice the rank if None.
        target_modules: names of layers, or ("all-linear",).
        given: further options by name, and `lora_kwargs`, fields by name.

    Raises:
        ValueError: peft is not installed, or names the option that is unknown, of another kind, or refused by peft.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"lora_rank={rank} needs peft: pip install peft ({error})") from error
    values = _values("lora_kwargs", "peft.LoraConfig", lora_fields(), LORA_ELSEWHERE, given)
    modules = list(target_modules)
    try:
        return peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            target_modules=modules[0] if modules == ["all-linear"] else modules,
            task_type="CAUSAL_LM",
            **values,
        )
    except Exception as error:  # whatever peft raises of a value
        raise ValueError(f"{_said(given)}: {describe_error(error)}") from error


def quantization_config(load_in_4bit: bool, load_in_8bit: bool, dtype: str, **given: Any) -> Any:
    """The `transformers.BitsAndBytesConfig` of a run: NF4 that computes in the precision of the weights, unless told.

    Args:
        load_in_4bit, load_in_8bit: one of them, or neither for None.
        dtype: of the weights that are not quantised.
        given: further options by name, and `bnb_kwargs`, arguments by name.

    Raises:
        ValueError: names the option that is unknown, of another kind, without an effect, or refused by transformers;
            or bitsandbytes is not installed.
    """
    values = _values("bnb_kwargs", "transformers.BitsAndBytesConfig", bnb_fields(), BNB_ELSEWHERE, given)
    bits = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    chosen = [option for option, is_chosen in bits.items() if is_chosen]
    if len(chosen) > 1:
        raise ValueError("load_in_4bit=True was given, and load_in_8bit=True, too: choose one")
    for name in values:
        needed = ["load_in_4bit"] if name.startswith(OF_4_BITS) else ["load_in_8bit"] if name in OF_8_BITS else [*bits]
        if not {*chosen} & {*needed}:
            spelled = option_string(name) if name in given else f"{option_string('bnb_kwargs')} with {name!r}"
            raise ValueError(f"{spelled} needs {' or '.join(map(option_string, needed))}")
    if not chosen:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{chosen[0]}=True needs bitsandbytes: pip install bitsandbytes")
    if values.get("bnb_4bit_quant_type", QUANT_TYPES[0]) not in QUANT_TYPES:
        raise ValueError(f"bnb_4bit_quant_type={values['bnb_4bit_quant_type']}: available: {', '.join(QUANT_TYPES)}")
    if load_in_4bit:
        values = {
            "bnb_4bit_quant_type": QUANT_TYPES[0],
            **({} if dtype == "auto" else {"bnb_4bit_compute_dtype": dtype}),
            **values,
        }
    from transformers import BitsAndBytesConfig

    try:
        return BitsAndBytesConfig(**bits, **values)
    except Exception as error:  # whatever transformers raises of a value
        raise ValueError(f"{_said(given)}: {describe_error(error)}") from error


def _values(
    mapping: str,
    owner: str,
    fields: Mapping[str, OptionField],
    elsewhere: Mapping[str, str],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The values of fields by their names, from options of their own and from the mapping.

    Args:
        mapping: the name of the option that is a mapping.
        owner: of the fields, for messages.
        fields: by the names of their options.
        elsewhere: fields that have another option.
        given: options by name.
    """
    by_name = {field.name: field for field in fields.values()}
    options = {field.name: option for option, field in fields.items()}
    values = {fields[option].name: value for option, value in given.items() if option in fields}
    for name, value in (given.get(mapping) or {}).items():
        where = f"{option_string(mapping)}: {name!r}"
        if name in elsewhere:
            raise ValueError(f"{where} is the option {option_string(elsewhere[name])}")
        if name not in by_name:
            nearest = did_you_mean(name, by_name)
            hint = f"; did you mean {nearest!r}?" if nearest in by_name else ""
            raise ValueError(f"{where} is no field of {owner}{hint}")
        if name in values:
            raise ValueError(f"{where} was given by an option of its own, too")
        if not fits(value, by_name[name].hint):
            raise ValueError(f"{where} must be {_as_text(by_name[name].hint)}, got {value!r}")
        values[name] = value
    for name, value in values.items():
        check_number(options[name], value)
    return values


def _as_text(hint: Any) -> str:
    return str(hint).replace("typing.", "") if typing.get_args(hint) else str(hint.__name__)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON or YAML is of a type, of those that such values can have."""
    if hint is Any:
        return True
    if len(members_of(hint)) > 1:
        return any(fits(value, member) for member in members_of(hint))
    if typing.get_origin(hint) is typing.Literal:  # which may say what goes on otherwise, in brackets
        starts = [
            choice.partition("[")[0] for choice in typing.get_args(hint) if isinstance(choice, str) and "[" in choice
        ]
        return value in typing.get_args(hint) or (isinstance(value, str) and value.startswith(tuple(starts)))
    kind = typing.get_origin(hint) or hint
    if kind in (list, tuple):
        inner = [member for member in typing.get_args(hint) if member is not Ellipsis]
        if not isinstance(value, list) or (kind is tuple and inner and len(inner) != len(value)):
            return False
        kinds = inner if kind is tuple and inner else (inner or [Any]) * len(value)
        return all(map(fits, value, kinds))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _said(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
