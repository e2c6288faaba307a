"""A pointwise program as a line of plain PyTorch: what the self-check of an emitted file computes.

Independent of the Triton generator on purpose: the two are compared in every emitted file.
"""

from __future__ import annotations

from moepass import pointwise
from moepass.pointwise import Call, Const, Expr, Var

#: Text over ``x`` (and ``y``) and constants ``a``, ``b`` for each key of ``moepass.pointwise.OPS``.
TEXTS = {
    "abs": "torch.abs({x})",
    "clamp": "torch.clamp({x}, {a}, {b})",
    "clamp_max": "torch.clamp({x}, max={a})",
    "clamp_min": "torch.clamp({x}, min={a})",
    "elu": "torch.nn.functional.elu({x}, {a})",
    "erf": "torch.erf({x})",
    "exp": "torch.exp({x})",
    "gelu": "torch.nn.functional.gelu({x})",
    "gelu_tanh": 'torch.nn.functional.gelu({x}, approximate="tanh")',
    "hardsigmoid": "torch.nn.functional.hardsigmoid({x})",
    "hardswish": "torch.nn.functional.hardswish({x})",
    "leaky_relu": "torch.nn.functional.leaky_relu({x}, {a})",
    "log1p": "torch.log1p({x})",
    "maximum": "torch.maximum({x}, {y})",
    "minimum": "torch.minimum({x}, {y})",
    "mish": "torch.nn.functional.mish({x})",
    "relu": "torch.relu({x})",
    "relu6": "torch.nn.functional.relu6({x})",
    "selu": "torch.nn.functional.selu({x})",
    "sigmoid": "torch.sigmoid({x})",
    "silu": "torch.nn.functional.silu({x})",
    "softplus": "torch.nn.functional.softplus({x})",
    "sqrt": "torch.sqrt({x})",
    "tanh": "torch.tanh({x})",
}


def torch_text(activation: str) -> str:
    """An expression over tensors ``g`` and ``u``.  Raises ``errors.BadActivation`` outside the grammar."""
    return _tensor(pointwise.parse(activation))


def _tensor(expr: Expr) -> str:
    """Text of an expression that must be a tensor."""
    return _text(expr) if pointwise.variables(expr) else f"torch.full_like(g, {_text(expr)})"


def _text(expr: Expr) -> str:
    match expr:
        case Var(name):
            return name
        case Const(value):
            return f"({value!r})"
        case Call("add" | "mul" | "div" | "pow" as op, (x, y)):
            symbol = {"add": "+", "mul": "*", "div": "/", "pow": "**"}[op]
            return f"({_text(x)} {symbol} {_exponent(y) if op == 'pow' else _text(y)})"
        case Call(op, args):
            tensors = pointwise.OPS[op].tensors
            names = dict(zip("xy", map(_tensor, args[:tensors]), strict=False))
            names |= dict(zip("ab", map(_text, args[tensors:]), strict=False))
            text = TEXTS[op].format(**names)
            return text if pointwise.variables(expr) else f"{text}.flatten()[0].item()"
    raise TypeError(expr)


def _exponent(expr: Expr) -> str:
    """Integer exponents as integers: torch then needs no logarithm of a negative base."""
    assert isinstance(expr, Const)
    return f"({int(expr.value)})" if expr.value == int(expr.value) else f"({expr.value!r})"
