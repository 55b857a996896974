"""Formulas of the losses, which are Python, as LaTeX for docs/losses.md."""

from __future__ import annotations

import ast

NAMES = {"beta": r"\beta", "e": r"\varepsilon"}
# How tightly a piece of LaTeX binds.
SUM, PRODUCT, POWER, WHOLE = range(4)


def latex(formula: str) -> str:
    """A formula over w, l, u, r, k, beta and e, of sums, products, powers, exp, log, log1p, max and one condition.

    Raises:
        ValueError: there is something else in it.
    """
    return _piece(ast.parse(formula, mode="eval").body)[0]


def _piece(node: ast.expr) -> tuple[str, int]:
    match node:
        case ast.Constant(value=int() as value):
            return str(value), WHOLE
        case ast.Name(id=name):
            return NAMES.get(name, name), WHOLE
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return f"-{_binding(operand, PRODUCT)}", SUM
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return f"{_piece(left)[0]} + {_binding(right, PRODUCT)}", SUM
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return f"{_piece(left)[0]} - {_binding(right, PRODUCT)}", SUM
        case ast.BinOp(left=ast.UnaryOp(op=ast.USub(), operand=left), op=ast.Mult() | ast.Div() as op, right=right):
            return f"-{_piece(ast.BinOp(left=left, op=op, right=right))[0]}", SUM  # the sign comes first
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return f"{_binding(left, PRODUCT)} {_binding(right, PRODUCT)}", PRODUCT
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return rf"\frac{{{_piece(left)[0]}}}{{{_piece(right)[0]}}}", PRODUCT
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return f"{_binding(left, WHOLE)}^{{{_piece(right)[0]}}}", POWER
        case ast.Call(func=ast.Name(id="exp"), args=[x]):
            return f"e^{{{_piece(x)[0]}}}", POWER
        case ast.Call(func=ast.Name(id="log"), args=[x]):
            return rf"\log{_bracketed(_piece(x)[0])}", PRODUCT
        case ast.Call(func=ast.Name(id="log1p"), args=[x]):
            return rf"\log{_bracketed(f'1 + {_piece(x)[0]}')}", PRODUCT
        case ast.Call(func=ast.Name(id="max"), args=[x, y]):
            return rf"\max{_bracketed(f'{_piece(x)[0]}, {_piece(y)[0]}')}", PRODUCT
        case ast.IfExp(
            test=ast.Compare(left=x, ops=[ast.Lt()], comparators=[y]), body=body, orelse=ast.Constant(value=0)
        ):
            return rf"{_piece(body)[0]} \text{{ where }} {_piece(x)[0]} \lt {_piece(y)[0]} \text{{, else }} 0", SUM
    raise ValueError(f"{ast.unparse(node)} has no LaTeX here")


def _binding(node: ast.expr, least: int) -> str:
    """A piece, in brackets where it binds less than that."""
    text, binds = _piece(node)
    return text if binds >= least else _bracketed(text)


def _bracketed(text: str) -> str:
    return rf"\left({text}\right)" if r"\frac" in text else f"({text})"
