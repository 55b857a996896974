"""docs/losses.md: every loss has its row, and every formula on the page is what the package computes."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from mpmath import mp, mpf

from dil_kernels import _C as compiled
from dil_kernels import Divergence, register_divergence
from dil_kernels.losses import LossOptions, divergence_names, get_divergence
from dil_kernels.losses.registry import _REGISTRY

DOCS = Path(__file__).parents[1] / "docs"
POINTS = (-2.5, -0.3, 0.4, 1.7)
FUNCTIONS = {"exp": mp.exp, "log": mp.log, "log1p": mp.log1p, "max": max}


@pytest.fixture(scope="module")
def make_losses():
    spec = importlib.util.spec_from_file_location("make_losses", DOCS / "make_losses.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_losses"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def value(formula: str, **variables: float) -> mpf:
    return mpf(eval(formula, {"__builtins__": {}, **FUNCTIONS}, {k: mpf(v) for k, v in variables.items()}))


@pytest.mark.parametrize("name", divergence_names())
def test_losses_and_gradients(make_losses, name: str) -> None:
    entry, parameters = make_losses.ENTRIES[name], LossOptions(loss_type=name).parameters
    if get_divergence(name).own("label_smoothing"):
        parameters = parameters._replace(label_smoothing=0.2)
    for w in POINTS:
        for l in POINTS:
            variables = {"w": w, "l": l, "k": parameters.power, "beta": parameters.beta}
            variables["e"] = parameters.label_smoothing
            actual = compiled.divergence_pair(parameters, w, l)
            for computed, formula in zip(actual, (entry.loss, entry.grad_w, entry.grad_l), strict=True):
                assert float(computed) == pytest.approx(float(value(formula, **variables)), rel=1e-13, abs=1e-15), (
                    formula
                )


@pytest.mark.parametrize("name", [name for name in divergence_names() if get_divergence(name).separable])
def test_generators(make_losses, name: str) -> None:
    """A and P are those of h, up to a constant each."""
    entry, parameters = make_losses.ENTRIES[name], LossOptions(loss_type=name).parameters
    k, beta, own = parameters.power, parameters.beta, (*parameters.own(), 0.0)[0]
    scalars = compiled.divergence_scalars(name)
    shifts: dict[str, list[float]] = {"A": [], "P": []}
    for u in POINTS:
        r = mp.exp(u)
        if entry.h is not None:
            slope = mp.diff(lambda x: value(entry.h, r=x, k=k), r)
            by_h = {"A": slope, "P": r * slope - value(entry.h, r=r, k=k)}
        for key, formula in (("A", entry.A), ("P", entry.P)):
            stated = value(formula, u=u, k=k, beta=beta)
            assert float(scalars[key](u, own)) == pytest.approx(float(stated), rel=1e-13), formula
            if entry.h is not None:
                shifts[key].append(float(by_h[key] - stated))
    assert (entry.h is not None) == get_divergence(name).bregman
    for values in filter(None, shifts.values()):
        assert max(values) - min(values) < 1e-10


def python_of(latex: str) -> str:
    """A formula of the page, back in Python."""
    where = re.fullmatch(r"(.*) \\text\{ where \} (.*) \\lt (.*) \\text\{, else \} 0", latex)
    if where:
        value_there, left, right = map(python_of, where.groups())
        return f"({value_there}) if {left} < {right} else 0"
    while "{" in latex:  # the innermost braces first
        for pattern, by in ((r"\\frac{([^{}]*)}{([^{}]*)}", r"((\1)/(\2))"), (r"(?<!\w)e\^{([^{}]*)}", r"exp(\1)")):
            latex = re.sub(pattern, by, latex)
        latex = re.sub(r"(?<!e)\^{([^{}]*)}", r"**(\1)", latex)
    latex = re.sub(r"\\(left|right)", "", latex).replace(r"\varepsilon", "e").replace("\\", "")
    return re.sub(r"(?<=[\w)]) (?=[\w(])", "*", latex)  # what stands side by side is multiplied


@pytest.mark.parametrize("name", divergence_names())
def test_formulas_are_the_same_in_latex(make_losses, name: str) -> None:
    entry = make_losses.ENTRIES[name]
    variables = {"w": -0.3, "l": 0.9, "u": 0.7, "r": 1.3, "k": 0.5, "beta": 0.4, "e": 0.2}
    for formula in filter(None, (entry.h, entry.A, entry.P, entry.loss, entry.grad_w, entry.grad_l)):
        latex = make_losses.latex(formula)
        assert f"${latex}$" in make_losses.section(name)
        back = value(python_of(latex), **variables)
        assert float(back) == pytest.approx(float(value(formula, **variables)), rel=1e-14), latex


def test_brackets_where_they_are_needed(make_losses) -> None:
    assert make_losses.latex("-(a - (b - c)) * (d + 1)**2 / (2*x)") == r"\frac{-(a - (b - c)) (d + 1)^{2}}{2 x}"
    with pytest.raises(ValueError, match="sin"):
        make_losses.latex("sin(w)")


def test_the_page_is_the_one_that_is_written(make_losses) -> None:
    assert (DOCS / "losses.md").read_text() == make_losses.page()
    pictures = {f"{name}.png" for name in (*make_losses.ENTRIES, "gradients")}
    assert {path.name for path in (DOCS / "losses").iterdir()} == pictures


def test_a_loss_without_a_row_is_noticed(make_losses) -> None:
    register_divergence(Divergence(name="undocumented", source="", h=lambda r: r**3 / 6))
    try:
        with pytest.raises(SystemExit, match="differ in: undocumented"):
            make_losses.page()
    finally:
        del _REGISTRY["undocumented"]
