"""The vocabulary of pointwise programs: expressions as values, the known operations, and expressions as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Variables in the order of the stacked input projections.
VARIABLES = ("g", "u")

#: Fields' names for whole programs (accepted wherever an expression is; shown in reports).
NAMED = {
    "swiglu": "silu(g)*u",
    "geglu": "gelu(g)*u",
    "geglu_tanh": "gelu_tanh(g)*u",
    "reglu": "relu(g)*u",
    "relu2": "relu(g)**2",
    "gpt_oss": "(clamp(u, -7.0, 7.0) + 1.0)*(clamp_max(g, 7.0)*sigmoid(1.702*clamp_max(g, 7.0)))",
}


@dataclass(frozen=True)
class Op:
    """One row of the vocabulary: how many tensor arguments, how many trailing constants, and the torch function."""

    tensors: int
    constants: int
    fn: Callable[..., Tensor]


#: The nonlinear vocabulary.  A new activation is one row here (and one derivative rule for the Triton generator).
OPS: dict[str, Op] = {
    "abs": Op(1, 0, torch.abs),
    "clamp": Op(1, 2, lambda x, lo, hi: torch.clamp(x, lo, hi)),
    "clamp_max": Op(1, 1, lambda x, hi: torch.clamp(x, max=hi)),
    "clamp_min": Op(1, 1, lambda x, lo: torch.clamp(x, min=lo)),
    "elu": Op(1, 1, lambda x, alpha: F.elu(x, alpha)),
    "erf": Op(1, 0, torch.erf),
    "exp": Op(1, 0, torch.exp),
    "gelu": Op(1, 0, F.gelu),
    "gelu_tanh": Op(1, 0, lambda x: F.gelu(x, approximate="tanh")),
    "hardsigmoid": Op(1, 0, F.hardsigmoid),
    "hardswish": Op(1, 0, F.hardswish),
    "leaky_relu": Op(1, 1, lambda x, slope: F.leaky_relu(x, slope)),
    "log1p": Op(1, 0, torch.log1p),
    "maximum": Op(2, 0, torch.maximum),
    "minimum": Op(2, 0, torch.minimum),
    "mish": Op(1, 0, F.mish),
    "relu": Op(1, 0, torch.relu),
    "relu6": Op(1, 0, F.relu6),
    "selu": Op(1, 0, F.selu),
    "sigmoid": Op(1, 0, torch.sigmoid),
    "silu": Op(1, 0, F.silu),
    "softplus": Op(1, 0, F.softplus),
    "sqrt": Op(1, 0, torch.sqrt),
    "tanh": Op(1, 0, torch.tanh),
}


@dataclass(frozen=True)
class Var:
    """An input projection."""

    name: str


@dataclass(frozen=True)
class Const:
    """A real number."""

    value: float


@dataclass(frozen=True)
class Call:
    """``op(*args)``; ``op`` is a key of OPS, or one of the field operations ``add mul div pow``."""

    op: str
    args: tuple[Expr, ...]


Expr = Var | Const | Call

ONE, MINUS_ONE = Const(1.0), Const(-1.0)


def add(*args: Expr) -> Expr:
    """Sum."""
    return Call("add", args)


def mul(*args: Expr) -> Expr:
    """Product."""
    return Call("mul", args)


def neg(x: Expr) -> Expr:
    """Negation."""
    return mul(MINUS_ONE, x)


def sub(x: Expr, y: Expr) -> Expr:
    """Difference."""
    return add(x, neg(y))


def div(x: Expr, y: Expr) -> Expr:
    """Quotient."""
    return Call("div", (x, y))


def power(x: Expr, exponent: float) -> Expr:
    """A constant power."""
    return Call("pow", (x, Const(exponent)))


# --- expression -> text ---------------------------------------------------------------------------------------------


def unparse(expr: Expr) -> str:
    """Write an expression so that ``parse`` reads it back."""
    return _text(expr, 0)


def _text(expr: Expr, binding: int) -> str:
    match expr:
        case Var(name):
            return name
        case Const(value):
            return repr(value) if value >= 0 else (f"({value!r})" if binding else repr(value))
        case Call("add", args):
            return _wrapped(" + ".join(_text(a, 1) for a in args), binding > 1)
        case Call("mul", args):
            return _wrapped("*".join(_text(a, 2) for a in args), binding > 2)
        case Call("div", (x, y)):
            return _wrapped(f"{_text(x, 2)}/{_text(y, 3)}", binding > 2)
        case Call("pow", (x, Const(exponent))):
            return _wrapped(f"{_text(x, 4)}**{_number(exponent)}", binding > 3)
        case Call(op, args):
            return f"{op}({', '.join(_text(a, 0) for a in args)})"
    raise TypeError(expr)


def _number(value: float) -> str:
    text = repr(int(value)) if value == int(value) else repr(value)
    return text if value >= 0 else f"({text})"


def _wrapped(text: str, wrap: bool) -> str:
    return f"({text})" if wrap else text


# --- questions about an expression -----------------------------------------------------------------------------------


def variables(expr: Expr) -> set[str]:
    """Names of the projections that an expression reads."""
    match expr:
        case Var(name):
            return {name}
        case Call(_, args):
            return set().union(*(variables(a) for a in args))
    return set()


def rename(expr: Expr, names: Mapping[str, str]) -> Expr:
    """The expression with its variables called by their new names; each must have one."""
    match expr:
        case Var(name):
            return Var(names[name])
        case Call(op, args):
            return Call(op, tuple(rename(a, names) for a in args))
    return expr


def degree(expr: Expr) -> float:
    """Polynomial degree over the projections; infinity for anything that is not a polynomial."""
    match expr:
        case Var():
            return 1.0
        case Const():
            return 0.0
        case Call("add", args):
            return max(degree(a) for a in args)
        case Call("mul", args):
            return sum(degree(a) for a in args)
        case Call("pow", (x, Const(e))) if e == int(e) and e >= 0:
            return degree(x) * e
        case Call(_, args):
            return math.inf if any(degree(a) > 0 for a in args) else 0.0
    return 0.0
