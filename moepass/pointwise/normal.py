"""The normal form of an expression: equal programs become equal strings.

Sums and products are flattened and sorted, constants folded, repeated factors become powers, and known spellings get
their names: ``x*sigmoid(x)`` is silu; ``0.5*x*(1 + erf(x/sqrt 2))`` is gelu, and likewise its tanh approximation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from moepass.pointwise.expr import ONE, Call, Const, Expr, add, mul, neg, power, unparse


def fold(expr: Expr) -> Expr:
    """The normal form.  Raises ``ArithmeticError`` where a constant is not finite."""
    if not isinstance(expr, Call):
        return expr
    args = tuple(fold(a) for a in expr.args)
    folded = _fold_call(expr.op, args)
    if isinstance(folded, Const) and not math.isfinite(folded.value):
        raise OverflowError("a constant is not finite")
    return folded


def _fold_call(op: str, args: tuple[Expr, ...]) -> Expr:
    match op:
        case "add":
            return _fold_add(args)
        case "mul":
            return _fold_mul(args)
        case "div":
            return _fold_div(args[0], args[1])
        case "pow":
            return _fold_pow(args[0], args[1])
        case "clamp" if args[1] == Const(-math.inf):
            return _fold_call("clamp_max", (args[0], args[2]))
        case "clamp" if args[2] == Const(math.inf):
            return _fold_call("clamp_min", (args[0], args[1]))
        case "clamp_max" if args[1] == Const(math.inf):
            return args[0]
        case "clamp_min" if args[1] == Const(-math.inf):
            return args[0]
        case "clamp_min" if args[1] == Const(0.0):
            return Call("relu", args[:1])
        case "maximum" | "minimum":
            return Call(op, tuple(sorted(args, key=unparse)))
    return Call(op, args)


def _flat(op: str, args: tuple[Expr, ...]) -> list[Expr]:
    flat: list[Expr] = []
    for arg in args:
        flat.extend(arg.args if isinstance(arg, Call) and arg.op == op else (arg,))
    return flat


def _fold_add(args: tuple[Expr, ...]) -> Expr:
    terms = _flat("add", args)
    constant = math.fsum(t.value for t in terms if isinstance(t, Const))
    rest: list[Expr] = sorted((t for t in terms if not isinstance(t, Const)), key=unparse)
    if constant != 0.0 or not rest:
        rest.append(Const(constant))
    return rest[0] if len(rest) == 1 else Call("add", tuple(rest))


def _fold_mul(args: tuple[Expr, ...]) -> Expr:
    constant, exponents = 1.0, dict[Expr, float]()
    for factor in _flat("mul", args):
        match factor:
            case Const(value):
                constant *= value
            case Call("pow", (base, Const(exponent))) if exponent == int(exponent):  # x**0.5 has a smaller domain
                exponents[base] = exponents.get(base, 0.0) + exponent
            case other:
                exponents[other] = exponents.get(other, 0.0) + 1.0
    factors = _name_factors(constant, exponents)
    return factors[0] if len(factors) == 1 else Call("mul", tuple(factors))


def _name_factors(constant: float, exponents: dict[Expr, float]) -> list[Expr]:
    """Sorted factors; ``x*sigmoid(x)`` becomes silu and the two written-out gelus their names."""
    for base in sorted(exponents, key=unparse):
        gate = Call("sigmoid", (base,))
        if exponents.get(base) == 1.0 and exponents.get(gate) == 1.0:
            del exponents[base], exponents[gate]
            exponents[Call("silu", (base,))] = exponents.get(Call("silu", (base,)), 0.0) + 1.0
        name = _gelu_spelling(base, exponents)
        if name and abs(constant - 0.5) < 1e-12:
            constant = 1.0
            del exponents[base], exponents[_gelu_gate(base, name, exponents)]
            exponents[Call(name, (base,))] = exponents.get(Call(name, (base,)), 0.0) + 1.0
    factors = [b if e == 1.0 else Call("pow", (b, Const(e))) for b, e in exponents.items() if e != 0.0]
    factors.sort(key=unparse)
    return [Const(constant), *factors] if constant != 1.0 or not factors else factors


def _gelu_spelling(base: Expr, exponents: Mapping[Expr, float]) -> str | None:
    if exponents.get(base) != 1.0:
        return None
    for name in ("gelu", "gelu_tanh"):
        try:
            _gelu_gate(base, name, exponents)
            return name
        except KeyError:
            continue
    return None


def _gelu_gate(base: Expr, name: str, exponents: Mapping[Expr, float]) -> Expr:
    """The factor ``1 + erf(x/sqrt 2)`` or ``1 + tanh(sqrt(2/pi)(x + 0.044715 x^3))``, x = base; KeyError if none."""
    for factor, exponent in exponents.items():
        if exponent != 1.0 or factor == base or not isinstance(factor, Call):
            continue
        if factor.op == "add" and _is_gate(factor, base, name):
            return factor
    raise KeyError(name)


def _is_gate(factor: Call, base: Expr, name: str) -> bool:
    inner_op = "erf" if name == "gelu" else "tanh"
    match factor.args:
        case (Call(op, (inner,)), Const(1.0)) if op == inner_op:
            pass
        case _:
            return False
    if name == "gelu":
        return _same(inner, fold(mul(base, Const(math.sqrt(0.5)))))
    cubic = add(base, mul(Const(0.044715), power(base, 3.0)))
    return _same(inner, fold(mul(Const(math.sqrt(2.0 / math.pi)), cubic)))


def _same(a: Expr, b: Expr) -> bool:
    """Equal up to 1e-9 in the constants."""
    match a, b:
        case Const(x), Const(y):
            return math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12)
        case Call(f, xs), Call(g, ys):
            return f == g and len(xs) == len(ys) and all(map(_same, xs, ys))
        case _:
            return a == b


def _fold_div(x: Expr, y: Expr) -> Expr:
    match x, y:
        case Const(a), Const(b):
            return Const(a / b)
        case _, Const(b):
            return _fold_mul((x, Const(1.0 / b)))
        case _, Call("add", (Call("exp", (inner,)), Const(1.0))):
            return _fold_mul((x, Call("sigmoid", (fold(neg(inner)),))))
    return Call("div", (x, y))


def _fold_pow(x: Expr, exponent: Expr) -> Expr:
    assert isinstance(exponent, Const)
    match x:
        case Const(value) if value > 0 or exponent.value == int(exponent.value):
            return Const(value**exponent.value)
        case Call("pow", (base, Const(inner))) if inner == int(inner) and exponent.value == int(exponent.value):
            return _fold_pow(base, Const(inner * exponent.value))
        case Call("mul", factors) if exponent.value == int(exponent.value):
            return _fold_mul(tuple(_fold_pow(factor, exponent) for factor in factors))
    if exponent.value == 1.0:
        return x
    return ONE if exponent.value == 0.0 else Call("pow", (x, exponent))
