"""Pointwise program -> Triton source of its value and its gradient (reverse mode, by the rows of ``rules``).

The text of a program reaches the source only through ``moepass.pointwise.parse``: what is written is made of rows,
numbers and the names ``g``, ``u``, ``dh``.
"""

from __future__ import annotations

import ast
import functools
import math
import textwrap
from collections.abc import Mapping

import torch

from moepass import pointwise
from moepass.kernels.codegen.rules import ROWS
from moepass.kernels.codegen.tape import Tape, substitute
from moepass.pointwise import Call, Const, Expr, Var
from moepass.pointwise.grammar import bad_activation

#: Integer powers up to this are products; larger ones go through exp2(p*log2|x|).
MAX_UNROLLED = 64
_FLOAT32 = torch.finfo(torch.float32)
_ARGUMENTS = ("g", "u", "dh")


@functools.lru_cache(maxsize=1024)
def bodies(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Lines of ``value(g, u) -> h`` and of ``grad(g, u, dh) -> (dg, du)``, float32 blocks in and out.

    An ungated program ignores ``u``, and its second gradient is zero.  Raises ``errors.BadActivation`` for a text
    outside the grammar, or with constants that float32 cannot hold.
    """
    try:
        expr = _constants_folded(pointwise.parse(text))
        forward = _Writer(text)
        value = forward.tape.body(h=_block(forward.write(expr)))
        backward = _Writer(text)
        dg, du = backward.gradients(expr)
        grad = backward.tape.body(dg=dg, du=du)
    except RecursionError:
        raise bad_activation(text, "nested too deeply") from None
    return tuple(value), tuple(grad)


def source(text: str) -> str:
    """A module with the JIT functions ``value`` and ``grad`` of one program."""
    value, grad = bodies(text)
    program = pointwise.unparse(pointwise.parse(text))
    helpers = [name for name in ("expm1", "log1p", "tanh") if any(f"{name}(" in line for line in (*value, *grad))]
    imports = ["import triton", "import triton.language as tl"]
    if helpers:
        imports += ["", f"from moepass.kernels.codegen.functions import {', '.join(helpers)}"]
    return "\n".join(
        [
            *_doc(f"The pointwise program {program} and its gradient; written by moepass.kernels.codegen."),
            "",
            *imports,
            *_function("value(g, u)", f"h = {program}", value),
            *_function("grad(g, u, dh)", f"dg, du of h = {program}", grad),
            "",
        ]
    )


def _function(head: str, doc: str, lines: tuple[str, ...]) -> list[str]:
    return ["", "", "@triton.jit", f"def {head}:", *(f"    {line}" for line in (*_doc(doc), *lines))]


def _doc(text: str) -> list[str]:
    first, *rest = textwrap.wrap(text, 108, break_long_words=False)
    return [f'"""{first}', *rest, '"""'] if rest else [f'"""{first}"""']


class _Writer:
    """Writes one expression on a tape, and its adjoints."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tape = Tape(reserved=[*_ARGUMENTS, "tl", "triton", "value", "grad", "expm1", "log1p", "tanh"])
        self.atoms: dict[Expr, ast.expr] = {}
        self.lets: dict[Expr, dict[str, ast.expr]] = {}

    def write(self, expr: Expr) -> ast.expr:
        """The atom that holds an expression's value."""
        if expr not in self.atoms:
            self.atoms[expr] = self._write(expr)
        return self.atoms[expr]

    def _write(self, expr: Expr) -> ast.expr:
        match expr:
            case Var(name):
                return ast.Name(name)
            case Const(value):
                return self._constant(value)
            case Call("pow", (x, Const(exponent))):
                return self._power(self.write(x), exponent)
            case Call(op, args):
                names = dict(zip(_letters(op, len(args)), (self.write(a) for a in args), strict=True))
                for name, template in ROWS[op].let:
                    names[name] = self.tape.bind(name, substitute(template, names))
                names["out"] = self.tape.bind(_hint(op), substitute(ROWS[op].value, names))
                self.lets[expr] = names
                return names["out"]
        raise TypeError(expr)

    def gradients(self, expr: Expr) -> tuple[ast.expr, ast.expr]:
        """dg and du."""
        self.write(expr)
        order = list(self.atoms)  # arguments stand before what reads them
        adjoints: dict[Expr, list[ast.expr]] = {expr: [ast.Name("dh")]}
        for node in reversed(order):
            if isinstance(node, Call) and node in adjoints:
                self._pull_back(node, self._sum(adjoints.pop(node)), adjoints)
        zero = substitute("tl.zeros_like(dh)", {})
        dg, du = (self._sum(adjoints[Var(v)]) if Var(v) in adjoints else zero for v in pointwise.VARIABLES)
        return dg, du

    def _sum(self, terms: list[ast.expr]) -> ast.expr:
        return functools.reduce(lambda a, b: self.tape.bind("d", ast.BinOp(a, ast.Add(), b)), terms)

    def _pull_back(self, node: Call, d: ast.expr, adjoints: dict[Expr, list[ast.expr]]) -> None:
        match node:
            case Call("pow", (x, Const(exponent))):
                slope = self._power(self.write(x), exponent - 1.0)
                scaled = ast.BinOp(ast.BinOp(d, ast.Mult(), self._constant(exponent)), ast.Mult(), slope)
                adjoints.setdefault(x, []).append(self.tape.bind("d", scaled))
            case Call(op, args):
                for arg, template in zip(args, ROWS[op].grads, strict=False):  # constants come last
                    if pointwise.variables(arg):
                        grad = substitute(template, {**self.lets[node], "d": d})
                        adjoints.setdefault(arg, []).append(self.tape.bind("d", grad))

    def _power(self, x: ast.expr, exponent: float) -> ast.expr:
        if exponent == 0.0:
            return ast.Constant(1.0)
        if exponent == 1.0:
            return x
        if exponent == 0.5:
            return self.tape.bind("root", substitute("tl.sqrt(x)", {"x": x}))
        if exponent < 0.0:
            return self.tape.bind("inverse", substitute("1.0 / x", {"x": self._power(x, -exponent)}))
        if exponent != int(exponent):
            return self.tape.bind("power", self._exp2("tl.exp2(a * tl.log2(x))", x, exponent))
        if exponent <= MAX_UNROLLED:
            return self._product(x, int(exponent))
        size = self.tape.bind("power", self._exp2("tl.exp2(a * tl.log2(tl.abs(x)))", x, exponent))
        odd = exponent % 2.0 == 1.0
        return self.tape.bind("power", substitute("tl.where(x < 0.0, -p, p)", {"x": x, "p": size})) if odd else size

    def _exp2(self, template: str, x: ast.expr, exponent: float) -> ast.expr:
        return substitute(template, {"x": x, "a": self._constant(exponent)})

    def _product(self, x: ast.expr, exponent: int) -> ast.expr:
        """``x**exponent`` by squaring."""
        if exponent == 1:
            return x
        half = self._product(x, exponent // 2)
        square = self.tape.bind("square", ast.BinOp(half, ast.Mult(), half))
        return self.tape.bind("power", ast.BinOp(square, ast.Mult(), x)) if exponent % 2 else square

    def _constant(self, value: float) -> ast.expr:
        size = abs(value)
        if size > _FLOAT32.max or 0.0 < size < _FLOAT32.tiny:
            raise bad_activation(self.text, f"the kernels compute in float32, which cannot hold the constant {value!r}")
        number = ast.Constant(size)
        return ast.UnaryOp(ast.USub(), number) if math.copysign(1.0, value) < 0 else number


def _letters(op: str, count: int) -> str:
    """Argument letters of a row: x, y for tensors, a, b for constants."""
    tensors = pointwise.OPS[op].tensors if op in pointwise.OPS else 2
    return "xy"[:tensors] + "ab"[: count - tensors]


def _hint(op: str) -> str:
    return {"add": "total", "mul": "product", "div": "quotient", "tanh": "tanh_x", "log1p": "log1p_x"}.get(op, op)


def _block(atom: ast.expr) -> ast.expr:
    """A block, where the value is a mere number."""
    number: Mapping[str, ast.expr] = {"c": atom}
    return atom if isinstance(atom, ast.Name) else substitute("tl.zeros_like(g) + c", number)


def _constants_folded(expr: Expr) -> Expr:
    """Calls without a variable become numbers, so that every call that is written has a block among its arguments."""
    if not isinstance(expr, Call):
        return expr
    args = tuple(_constants_folded(a) for a in expr.args)
    if expr.op == "pow" and args[1] == Const(0.0):
        return Const(1.0)
    if not all(isinstance(a, Const) for a in args):
        return Call(expr.op, args)
    number = pointwise.evaluate(Call(expr.op, args), {"g": torch.zeros((), dtype=torch.float64)})
    return Const(float(number))
