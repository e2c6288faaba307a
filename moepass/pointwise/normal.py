"""The normal form of an expression: equal programs become equal strings.

Sums and products are flattened and sorted, constants folded, repeated factors become powers, and known spellings get
their names: ``x*sigmoid(x)`` is silu; ``0.5*x*(1 + erf(x/sqrt 2))`` is gelu, and likewise its tanh approximation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from moepass.pointwise.expr import ONE, Call, Const, Expr, add, mul, neg, power, unparse


def fold(expr: Expr) -> Expr:
    """The normal form.  Raises ``ArithmeticError`` where a constant is not a finite real number."""
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
    constant, exponents = _factors(_flat("mul", args))
    factors = _name_factors(constant, exponents)
    return factors[0] if len(factors) == 1 else Call("mul", tuple(factors))


def _factors(args: Iterable[Expr]) -> tuple[float, dict[Expr, float]]:
    """A product as ``constant * prod(base**exponent)``; silu is written out: its parts may meet other factors."""
    constant, exponents = 1.0, dict[Expr, float]()
    for factor in args:
        match factor:
            case Const(value):
                constant *= value
            case Call("pow", (base, Const(exponent))) if exponent == int(exponent):  # x**0.5 has a smaller domain
                _multiply(exponents, base, exponent)
            case other:
                _multiply(exponents, other, 1.0)
    return constant, exponents


def _multiply(exponents: dict[Expr, float], base: Expr, exponent: float) -> None:
    parts = {base: 1.0}
    if isinstance(base, Call) and base.op == "silu":
        parts = _silu_factors(base.args[0]) or parts
    for part, times in parts.items():
        exponents[part] = exponents.get(part, 0.0) + times * exponent


def _silu_factors(x: Expr) -> dict[Expr, float]:
    """``silu(x)`` as factors; empty where x has a constant factor, which would leave a stray constant outside."""
    constant, factors = _factors(_flat("mul", (x,)))
    if constant != 1.0 or not factors:
        return {}
    _multiply(factors, Call("sigmoid", (x,)), 1.0)
    return {factor: exponent for factor, exponent in factors.items() if exponent != 0.0}


def _name_factors(constant: float, exponents: dict[Expr, float]) -> list[Expr]:
    """Sorted factors; ``x*sigmoid(x)`` becomes silu and the two written-out gelus their names."""
    named = _take_silus(exponents)
    for base in sorted(exponents, key=unparse):
        name = _gelu_spelling(base, exponents)
        if name and abs(constant - 0.5) < 1e-12:
            constant = 1.0
            del exponents[base], exponents[_gelu_gate(base, name, exponents)]
            named[Call(name, (base,))] = named.get(Call(name, (base,)), 0.0) + 1.0
    for factor, exponent in named.items():
        exponents[factor] = exponents.get(factor, 0.0) + exponent
    factors = [b if e == 1.0 else Call("pow", (b, Const(e))) for b, e in exponents.items() if e != 0.0]
    factors.sort(key=unparse)
    return [Const(constant), *factors] if constant != 1.0 or not factors else factors


def _take_silus(exponents: dict[Expr, float]) -> dict[Expr, float]:
    """Take every whole ``x*sigmoid(x)`` out, the largest x first: the order of the factors is no matter."""
    named = dict[Expr, float]()
    gates = [f for f in exponents if isinstance(f, Call) and f.op == "sigmoid"]
    for gate in sorted(gates, key=lambda f: (-len(unparse(f)), unparse(f))):
        silu = Call("silu", gate.args)
        parts = _silu_factors(gate.args[0])
        sign = math.copysign(1.0, exponents[gate])
        times = min((math.floor(sign * exponents.get(f, 0.0) / e) for f, e in parts.items()), default=0)
        if times <= 0:
            continue
        for part, exponent in parts.items():
            exponents[part] -= sign * times * exponent
        named[silu] = sign * times
    for spent in [f for f, e in exponents.items() if e == 0.0]:
        del exponents[spent]
    return named


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
        case Const(value):
            if value < 0 and exponent.value != int(exponent.value):
                raise ArithmeticError(f"{value!r}**{exponent.value!r} is not a real number")
            return Const(value**exponent.value)
        case Call("pow", (base, Const(inner))) if inner == int(inner) and exponent.value == int(exponent.value):
            return _fold_pow(base, Const(inner * exponent.value))
        case Call("mul", factors) if exponent.value == int(exponent.value):
            return _fold_mul(tuple(_fold_pow(factor, exponent) for factor in factors))
    if exponent.value == 1.0:
        return x
    return ONE if exponent.value == 0.0 else Call("pow", (x, exponent))
