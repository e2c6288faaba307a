"""Pointwise programs: the small expression language that names an activation.

An activation is whatever stands between the input projections and the output projection of a feed-forward block.
It is written over ``g`` (the first or gate projection) and, when gated, ``u`` (the up projection)::

    silu(g)*u      gelu(g)      relu(g)**2      clamp(g, -7.0, 7.0)*sigmoid(1.702*g)*(u + 1.0)

The same string drives the reference, the torch lowerings and the kernels.  Text is parsed by a whitelist over Python's
own grammar and never evaluated.  ``canonical`` maps equal programs to equal strings: sums and products are flattened
and sorted, constants folded, and known spellings (tanh-gelu written out, x*sigmoid(x)) get their names.
"""

from __future__ import annotations

import functools

from torch import Tensor

from moepass.pointwise.expr import (
    MINUS_ONE,
    NAMED,
    ONE,
    OPS,
    VARIABLES,
    Call,
    Const,
    Expr,
    Op,
    Var,
    add,
    degree,
    div,
    mul,
    neg,
    power,
    rename,
    sub,
    unparse,
    variables,
)
from moepass.pointwise.grammar import bad_activation, known_names, parse
from moepass.pointwise.normal import fold
from moepass.pointwise.run import evaluate

__all__ = [
    "MINUS_ONE",
    "NAMED",
    "ONE",
    "OPS",
    "VARIABLES",
    "Call",
    "Const",
    "Expr",
    "Op",
    "Var",
    "add",
    "apply",
    "canonical",
    "degree",
    "display_name",
    "div",
    "evaluate",
    "flops_per_element",
    "fold",
    "is_nonlinear",
    "known_names",
    "mul",
    "n_inputs",
    "neg",
    "parse",
    "power",
    "rename",
    "sub",
    "unparse",
    "variables",
]


@functools.lru_cache(maxsize=1024)
def canonical(text: str) -> str:
    """The normal form of an expression or name; equal strings mean equal programs."""
    try:
        return unparse(fold(parse(text)))
    except RecursionError as error:
        raise bad_activation(text, f"nested too deeply ({error})") from None


@functools.lru_cache(maxsize=1024)
def display_name(text: str) -> str:
    """``swiglu`` for ``silu(g)*u``; the expression itself where the field has no name for it."""
    wanted = canonical(text)
    for name, expression in NAMED.items():
        if canonical(expression) == wanted:
            return name
    return wanted.removesuffix("(g)") if wanted.endswith("(g)") and wanted.removesuffix("(g)") in OPS else wanted


@functools.lru_cache(maxsize=1024)
def n_inputs(text: str) -> int:
    """1 for an ungated program (reads g), 2 for a gated one (reads u)."""
    return 2 if "u" in variables(parse(text)) else 1


def is_nonlinear(text: str) -> bool:
    """Whether the program is more than a linear map of its inputs."""
    return degree(fold(parse(text))) > 1


def flops_per_element(text: str) -> int:
    """Operations per hidden element, counting each node once (for the cost model)."""

    def count(expr: Expr) -> int:
        return 1 + sum(count(a) for a in expr.args) if isinstance(expr, Call) else 0

    return max(1, count(parse(text)))


def apply(text: str, h: Tensor, *, dim: int = -1, interleaved: bool = False) -> Tensor:
    """Run the program on stacked pre-activations (n*F along ``dim``, gate rows first) -> F along ``dim``, in h's dtype.

    ``interleaved``: gate and up alternate instead (GPT-OSS).
    """
    if n_inputs(text) == 1:
        return evaluate(parse(text), {"g": h})
    g, u = h.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1) if interleaved else h.chunk(2, dim=dim)
    return evaluate(parse(text), {"g": g, "u": u})
