"""How each operation of the pointwise language is written in Triton, and its derivative: one row per operation.

A row's texts are Triton expressions over ``x`` (and ``y``), its tensor arguments, and ``a``, ``b``, its constants.
``let`` binds names for parts that value and derivative share; ``out`` is the value, ``d`` the gradient of the value.
``grads`` holds the gradient of each tensor argument.  At kinks they give what torch.autograd gives: 0 for relu at 0,
the whole gradient at the border of a clamp, half of it to each argument of a tied maximum.

NaN stays NaN: hence ``where`` and not Triton's ``maximum``, which by default drops it on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Value and derivative of one operation as texts; see the module."""

    value: str
    grads: tuple[str, ...]
    let: tuple[tuple[str, str], ...] = ()


def _let(**names: str) -> tuple[tuple[str, str], ...]:
    return tuple(names.items())


_SELU_SCALE, _SELU_ALPHA = "1.0507009873554805", "1.6732632423543772"

#: One row per key of ``moepass.pointwise.OPS``, and the field operations; ``pow`` is unrolled in ``derive``.
ROWS: dict[str, Row] = {
    "add": Row("x + y", ("d", "d")),
    "mul": Row("x * y", ("d * y", "d * x")),
    "div": Row("x / y", ("d / y", "-d * out / y")),
    "abs": Row("tl.abs(x)", ("tl.where(x > 0.0, d, tl.where(x < 0.0, -d, 0.0))",)),
    "clamp": Row(
        "tl.where(low > b, b, low)",
        ("tl.where((x >= a) & (x <= b), d, 0.0)",),
        _let(low="tl.where(x < a, a, x)"),
    ),
    "clamp_max": Row("tl.where(x > a, a, x)", ("tl.where(x <= a, d, 0.0)",)),
    "clamp_min": Row("tl.where(x < a, a, x)", ("tl.where(x >= a, d, 0.0)",)),
    "elu": Row("tl.where(x > 0.0, x, a * expm1(x))", ("tl.where(x > 0.0, d, d * a * tl.exp(x))",)),
    "erf": Row("tl.erf(x)", ("d * 1.1283791670955126 * tl.exp(-x * x)",)),
    "exp": Row("tl.exp(x)", ("d * out",)),
    "gelu": Row(
        "x * cdf",
        ("d * (cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x)))",),
        _let(cdf="0.5 + 0.5 * tl.erf(0.7071067811865476 * x)"),
    ),
    "gelu_tanh": Row(  # 0.5*(1 + tanh(z)) = sigmoid(2z)
        "x * gate",
        ("d * gate * (1.0 + (1.0 - gate) * x * (1.5957691216057308 + 0.2140644488178237 * x * x))",),
        _let(gate="tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))"),
    ),
    "hardsigmoid": Row(
        "tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, x * 0.16666666666666666 + 0.5))",
        ("tl.where((x > -3.0) & (x < 3.0), d * 0.16666666666666666, 0.0)",),
    ),
    "hardswish": Row(
        "tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, x, x * (x * 0.16666666666666666 + 0.5)))",
        ("tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, d, d * (x * 0.3333333333333333 + 0.5)))",),
    ),
    "leaky_relu": Row("tl.where(x > 0.0, x, a * x)", ("tl.where(x > 0.0, d, a * d)",)),
    "log1p": Row("log1p(x)", ("d / (1.0 + x)",)),
    "maximum": Row(
        "tl.where((x > y) | (x != x), x, y)",
        (
            "tl.where(x == y, 0.5 * d, tl.where(x < y, 0.0, d))",
            "tl.where(x == y, 0.5 * d, tl.where(x > y, 0.0, d))",
        ),
    ),
    "minimum": Row(
        "tl.where((x < y) | (x != x), x, y)",
        (
            "tl.where(x == y, 0.5 * d, tl.where(x > y, 0.0, d))",
            "tl.where(x == y, 0.5 * d, tl.where(x < y, 0.0, d))",
        ),
    ),
    "mish": Row(  # tanh(softplus(x)) = n/(n + 2) with n = exp(x)*(exp(x) + 2); it is 1 in float32 beyond 20
        "x * tanh_softplus",
        ("d * (tanh_softplus + x * (1.0 - tanh_softplus * tanh_softplus) * tl.sigmoid(x))",),
        _let(
            e="tl.exp(tl.where(x > 20.0, 20.0, x))",
            n="e * (e + 2.0)",
            tanh_softplus="n / (n + 2.0)",
        ),
    ),
    "relu": Row("tl.where(x < 0.0, 0.0, x)", ("tl.where(x <= 0.0, 0.0, d)",)),
    "relu6": Row(
        "tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))",
        ("tl.where((x <= 0.0) | (x >= 6.0), 0.0, d)",),
    ),
    "selu": Row(
        f"{_SELU_SCALE} * tl.where(x > 0.0, x, {_SELU_ALPHA} * expm1(x))",
        (f"{_SELU_SCALE} * d * tl.where(x > 0.0, 1.0, {_SELU_ALPHA} * tl.exp(x))",),
    ),
    "sigmoid": Row("tl.sigmoid(x)", ("d * out * (1.0 - out)",)),
    "silu": Row("x * sigmoid", ("d * sigmoid * (1.0 + x * (1.0 - sigmoid))",), _let(sigmoid="tl.sigmoid(x)")),
    "softplus": Row("tl.where(x > 20.0, x, log1p(tl.exp(x)))", ("tl.where(x > 20.0, d, d * tl.sigmoid(x))",)),
    "sqrt": Row("tl.sqrt(x)", ("0.5 * d / out",)),
    "tanh": Row("tanh(x)", ("d * (1.0 - out * out)",)),
}
