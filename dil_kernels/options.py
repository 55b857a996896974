"""The options of scoring: what the public functions take as keywords, and the checked objects they make of them.

An option is declared here, once as a keyword (for editors and type checkers) and once as the field of a frozen object,
with its default and its documentation. `takes` puts both into the signature and the docstring of a public function.
`dil_kernels.losses.options` does the same for losses.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, TypeVar, get_type_hints

import torch
from torch.distributed import ProcessGroup

from dil_kernels.checks import check_number, check_positive, is_integer

Function = TypeVar("Function", bound=Callable[..., Any])


def takes(*classes: type[Any]) -> Callable[[Function], Function]:
    """For a function with `**options`: the fields of frozen classes in its signature, and their documentation.

    The line of its docstring that documents `options` gives way to that of the fields.

    Args:
        classes: what the function makes of its options.
    """
    documentation: dict[str, str] = {}
    parameters: dict[str, inspect.Parameter] = {}
    for cls in classes:
        documentation |= _documentation(cls)
        kinds, keyword = get_type_hints(cls), inspect.Parameter.KEYWORD_ONLY
        for field in dataclasses.fields(cls):
            parameters[field.name] = inspect.Parameter(
                field.name, keyword, default=field.default, annotation=kinds[field.name]
            )

    def documented(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        function.__signature__ = signature.replace(parameters=[*own, *parameters.values()])  # type: ignore[attr-defined]
        function.__annotations__ |= {name: parameter.annotation for name, parameter in parameters.items()}
        function.__annotations__.pop("options")
        if function.__doc__ is not None:
            text = "\n".join(dict.fromkeys(documentation[name] for name in parameters))
            function.__doc__ = re.sub(r"^ +options: .*\n", lambda _: f"{text}\n", function.__doc__, flags=re.M)
        return function

    return documented


def _documentation(cls: type[Any]) -> dict[str, str]:
    """What the docstrings of a class and of its bases say of each field, indented as in a function's."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        lines = (base.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0].rstrip()
        for entry in re.split(r"\n(?= {8}\w)", lines):
            found |= dict.fromkeys(entry.partition(":")[0].strip().split(", "), entry)
    return found


def split(function: str, options: Mapping[str, Any], *classes: type[Any]) -> list[Any]:
    """Keywords as the frozen objects they belong to.

    Args:
        function: its name, for the error.
        options: the keywords.
        classes: of the objects; no two have a field of one name.

    Raises:
        TypeError: a keyword that none of them has.
    """
    fields: list[dict[str, Any]] = [{} for _ in classes]
    for name, value in options.items():
        for cls, own in zip(classes, fields, strict=True):
            if name in cls.__dataclass_fields__:
                own[name] = value
                break
        else:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return [cls(**own) for cls, own in zip(classes, fields, strict=True)]


class Processing(NamedTuple):
    """What the ops on logits take of `ScoringOptions`."""

    ignore_index: int
    shift: bool
    softcapping: float  # 0 for none
    temperature: float


class ScoringKeywords(TypedDict, total=False):
    """See `ScoringOptions`."""

    ignore_index: int
    shift: bool
    final_logit_softcapping: float | None
    temperature: float
    process_group: ProcessGroup | None
    backend: str


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Which labels are scored, and what becomes of the logits first.

    Attributes:
        ignore_index: the label of positions that are not scored.
        shift: position t scores label t + 1, as causal models are trained; no shifted copy of the logits is made.
        final_logit_softcapping: replaces the logits x by cap * tanh(x / cap) (Gemma), cap > 0; None does not.
        temperature: divides the logits, after the softcapping; > 0.
        process_group: the vocabulary is split over its processes, of which each gives its part, in the order of their
            ranks: logits [..., V / p], or weight [V / p, D] and bias, the parts of any sizes. Labels count over the
            whole vocabulary, and all but the parts is the same on every process, as are results and gradients of hidden
            states. A DTensor that is split over the vocabulary says its group itself. On the CPU an error of one
            process is raised on all of them; on CUDA, shapes are compared when a process meets new ones.
        backend: "auto", "triton" (CUDA), "cpp" (CPU) or "eager" (PyTorch, which materialises the softmax in fp32).
    """

    ignore_index: int = -100
    shift: bool = True
    final_logit_softcapping: float | None = None
    temperature: float = 1.0
    process_group: ProcessGroup | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not is_integer(self.ignore_index):
            raise TypeError(f"ignore_index must be an integer, got {self.ignore_index!r}")
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"ignore_index must be an int64 as the labels are, got {self.ignore_index}")
        if not isinstance(self.shift, int) or self.shift not in (0, 1):
            raise TypeError(f"shift must be true or false, got {self.shift!r}")

    @property
    def processing(self) -> Processing:
        """For the ops."""
        return Processing(self.ignore_index, self.shift, self.final_logit_softcapping or 0.0, self.temperature)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """What is done to logits of a dtype: numbers that fp32, or fp64 for fp64 logits, holds with room to spare."""
        name, exponent = ("fp64", 1000) if dtype == torch.float64 else ("fp32", 100)
        for factor, value in self._factors().items():
            if not 2.0**-exponent <= abs(value) <= 2.0**exponent:
                raise ValueError(
                    f"{factor} must be between {2.0**-exponent:.1e} and {2.0**exponent:.1e} in size for logits of "
                    f"{name}, got {value}"
                )

    def _factors(self) -> dict[str, float]:
        """What multiplies or divides logits, by name."""
        cap, temperature = self.final_logit_softcapping, self.temperature
        check_positive("temperature", temperature)
        if cap is None:
            return {"temperature": temperature}
        check_positive("final_logit_softcapping", cap)
        factors = {"temperature": temperature, "final_logit_softcapping": cap}
        return factors | {"final_logit_softcapping / temperature": cap / temperature}


class LogitsKeywords(ScoringKeywords, total=False):
    """See `LogitsOptions`."""

    inplace_backward: bool


@dataclass(frozen=True, kw_only=True)
class LogitsOptions(ScoringOptions):
    """How logits are scored.

    Attributes:
        inplace_backward: write the gradient over the logits instead of into a new buffer. Whoever else needs the logits
            for its backward gets autograd's error, as does a second backward. Under saved-tensor hooks, which leave
            out autograd's check, the gradient gets a new buffer all the same.
    """

    inplace_backward: bool = False


class HeadKeywords(ScoringKeywords, total=False):
    """See `HeadOptions`."""

    logit_scale: float
    stash_bytes: int | None
    max_scored_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class HeadOptions(ScoringOptions):
    """How hidden states are scored through a head.

    Attributes:
        logit_scale: multiplies the logits, first (Granite: 1 / logits_scaling; Cohere: logit_scale).
        stash_bytes: memory for the gradients of the logits, in the dtype of the weight, kept from forward to backward;
            rows beyond it are computed again in the backward. None: an eighth of the device's memory. Where the weight
            needs no gradient nothing is kept. The split changes gradients by roundings: set it for results that are the
            same bit by bit on machines of other memory.
        max_scored_tokens: a bound on how many positions are scored. On CUDA, counting them waits for the device, which
            a bound avoids; under torch.compile or in a CUDA graph the default is all positions. Positions beyond the
            bound have log-prob NaN; in eager mode on the CPU they raise.
    """

    logit_scale: float = 1.0
    stash_bytes: int | None = None
    max_scored_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("logit_scale", self.logit_scale)
        if not 0 < abs(self.logit_scale) < math.inf:
            raise ValueError(f"logit_scale must be a finite number other than 0, got {self.logit_scale}")
        for name in ("stash_bytes", "max_scored_tokens"):
            value = getattr(self, name)
            if value is not None and (not is_integer(value) or value < 0):
                raise ValueError(f"{name} must be None or an integer >= 0, got {value!r}")

    def _factors(self) -> dict[str, float]:
        factors, scale = super()._factors(), self.logit_scale  # which checks the temperature
        scaled = {} if scale == 1.0 else {"logit_scale": scale, "logit_scale / temperature": scale / self.temperature}
        return factors | scaled
