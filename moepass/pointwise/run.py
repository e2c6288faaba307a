"""Expressions over tensors: the plain torch evaluation that is the definition of a program."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from moepass.pointwise.expr import OPS, Call, Const, Expr, Var


def evaluate(expr: Expr, values: Mapping[str, Tensor]) -> Tensor:
    """Plain torch evaluation of one expression."""
    return _tensor(_eval(expr, values), values)


def _tensor(value: Tensor | float, values: Mapping[str, Tensor]) -> Tensor:
    """A constant where a tensor must stand."""
    return value if isinstance(value, Tensor) else torch.full_like(next(iter(values.values())), value)


def _eval(expr: Expr, values: Mapping[str, Tensor]) -> Tensor | float:
    match expr:
        case Var(name):
            return values[name]
        case Const(value):
            return value
        case Call("add", args):
            return functools.reduce(lambda x, y: x + y, (_eval(a, values) for a in args))
        case Call("mul", args):
            return functools.reduce(lambda x, y: x * y, (_eval(a, values) for a in args))
        case Call("div", (x, y)):
            return _eval(x, values) / _eval(y, values)
        case Call("pow", (x, Const(exponent))):
            return _eval(x, values) ** (int(exponent) if exponent == int(exponent) else exponent)
        case Call(op, args):
            row = OPS[op]
            tensors = [_tensor(_eval(a, values), values) for a in args[: row.tensors]]
            return row.fn(*tensors, *(_eval(a, values) for a in args[row.tensors :]))
    raise TypeError(expr)
