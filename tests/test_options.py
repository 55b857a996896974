"""What the public functions say of their options, and that each is declared alike where it is declared."""

from __future__ import annotations

import dataclasses
import inspect
import typing
import warnings

import pytest
import torch

import dil_kernels
from dil_kernels import backends
from dil_kernels.functional.linear import FusedHeadKeywords
from dil_kernels.functional.loss import FusedLogitsKeywords
from dil_kernels.losses import FusedLossOptions, LossOptions
from dil_kernels.losses.options import LossKeywords
from dil_kernels.options import HeadKeywords, HeadOptions, LogitsKeywords, LogitsOptions
from dil_kernels.training.loss_fields import LossFields

DECLARED = {
    "token_logps": (LogitsKeywords, LogitsOptions),
    "sequence_logps": (LogitsKeywords, LogitsOptions),
    "linear_token_logps": (HeadKeywords, HeadOptions),
    "linear_sequence_logps": (HeadKeywords, HeadOptions),
    "dil_loss": (LossKeywords, LossOptions),
    "unpaired_dil_loss": (LossKeywords, LossOptions),
    "fused_dil_loss": (FusedLogitsKeywords, FusedLossOptions, LogitsOptions),
    "fused_linear_dil_loss": (FusedHeadKeywords, FusedLossOptions, HeadOptions),
}


@pytest.mark.parametrize("name", DECLARED)
def test_options_are_keywords_with_default_type_and_documentation(name: str) -> None:
    function = getattr(dil_kernels, name)
    keywords, *classes = DECLARED[name]
    fields = {field.name: field for cls in classes for field in dataclasses.fields(cls)}
    parameters = inspect.signature(function).parameters
    assert {*typing.get_type_hints(keywords)} == {*fields} <= {*parameters}
    hints = typing.get_type_hints(function)
    for option, field in fields.items():
        assert parameters[option].default == field.default
        assert hints[option] == typing.get_type_hints(keywords)[option]
        assert f"        {option}" in function.__doc__ or f", {option}" in function.__doc__
    assert "options" not in parameters
    assert "options:" not in function.__doc__


@pytest.mark.parametrize("name", DECLARED)
def test_an_unknown_keyword_is_that_of_the_function(name: str) -> None:
    function = getattr(dil_kernels, name)
    tensors = [p.name for p in inspect.signature(function).parameters.values() if p.default is inspect.Parameter.empty]
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'gamma'"):
        function(*(torch.zeros(2, 3, 4) for _ in tensors), gamma=1.0)


def test_the_configs_have_the_options_of_a_loss_with_their_defaults() -> None:
    of_loss = {field.name: field.default for field in dataclasses.fields(LossOptions)}
    for field in dataclasses.fields(LossFields):
        assert of_loss[field.name] == field.default


def test_a_warning_is_of_the_callers_line(monkeypatch: pytest.MonkeyPatch) -> None:
    backends._warn_once.cache_clear()
    monkeypatch.setattr(backends, "_select", lambda *_: ("eager", "no reason"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dil_kernels.token_logps(torch.zeros(1, 2, 3), torch.zeros(1, 2).long())
    backends._warn_once.cache_clear()
    assert [warning.filename for warning in caught] == [__file__]
