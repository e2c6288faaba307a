"""Text -> expression: a whitelist over Python's own grammar; nothing is ever evaluated."""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable

from moepass import errors
from moepass.pointwise.expr import NAMED, OPS, VARIABLES, Call, Const, Expr, Var, add, div, mul, neg, power, sub
from moepass.pointwise.normal import fold

#: Longer texts are refused unread.
MAX_LENGTH = 2000

_BINARY: dict[type[ast.operator], Callable[[Expr, Expr], Expr]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: div,
}


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Expr:
    """Read an expression or a known name.

    Raises ``errors.BadActivation`` on anything outside the grammar, and on constants that are no finite real numbers.
    """
    source = NAMED.get(text, f"{text}(g)" if text in OPS and OPS[text].tensors + OPS[text].constants == 1 else text)
    if len(source) > MAX_LENGTH:
        raise bad_activation(text[:40] + "...", f"longer than {MAX_LENGTH} characters")
    try:
        expr = _from_ast(ast.parse(source, mode="eval").body, text)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise bad_activation(text, f"not an expression ({error})") from None
    try:
        fold(expr)
    except (ArithmeticError, RecursionError) as error:
        raise bad_activation(text, f"constants cannot be folded ({error})") from None
    return expr


def _from_ast(node: ast.expr, text: str) -> Expr:
    match node:
        case ast.Constant(value=bool()):
            raise bad_activation(text, "booleans are not numbers here")
        case ast.Constant(value=int() | float() as value):
            return _number(float(value), text)
        case ast.Name(id=name) if name in VARIABLES:
            return Var(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return neg(_from_ast(operand, text))
        case ast.BinOp(op=ast.Pow(), left=left, right=right):
            exponent = fold(_from_ast(right, text))
            if not isinstance(exponent, Const):
                raise bad_activation(text, "exponents must be constants")
            return power(_from_ast(left, text), exponent.value)
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_from_ast(left, text), _from_ast(right, text))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in OPS:
            return _checked_call(name, tuple(_from_ast(a, text) for a in args), text)
        case _:
            raise bad_activation(text, f"{ast.unparse(node)!r} is outside the grammar")


def _number(value: float, text: str) -> Const:
    if not math.isfinite(value):
        raise bad_activation(text, "a number is too large")
    return Const(value)


def _checked_call(name: str, args: tuple[Expr, ...], text: str) -> Expr:
    op = OPS[name]
    if len(args) != op.tensors + op.constants:
        raise bad_activation(text, f"{name} takes {op.tensors + op.constants} arguments")
    constants = tuple(fold(a) for a in args[op.tensors :])
    if not all(isinstance(c, Const) for c in constants):
        raise bad_activation(text, f"the last {op.constants} arguments of {name} must be constants")
    return Call(name, args[: op.tensors] + constants)


def bad_activation(text: str, detail: str) -> errors.BadActivation:
    """The error for a text that is no program."""
    return errors.BadActivation(text=text, detail=detail, known=known_names())


def known_names() -> str:
    """The names that ``parse`` accepts besides expressions."""
    return ", ".join([*NAMED, *(n for n, op in OPS.items() if op.tensors == 1 and op.constants == 0)])
