"""Pointwise code generation: the generated text computes the program and what torch.autograd says its gradient is.

Random programs run the text in float64 with torch in the place of Triton's language, which checks the derivative rules
exactly; every operation, with its kinks, then runs in Triton's interpreter.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st

from moepass import errors, pointwise
from moepass.kernels.codegen import pointwise_functions, source
from moepass.kernels.codegen.derive import bodies
from moepass.kernels.codegen.rules import ROWS
from moepass.pointwise import NAMED, OPS, Call

#: Kinks of the vocabulary, both sides of them, and where float32 has trouble.
POINTS = [-30.0, -7.0, -3.0, -1.0, -0.5, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 0.25, 1.0, 3.0, 6.0, 7.0, 30.0]


def _call(name: str, x: str = "g") -> str:
    constants = {
        "clamp": ", -1.0, 3.0",
        "elu": ", 1.5",
        "leaky_relu": ", 0.1",
        "clamp_max": ", 3.0",
        "clamp_min": ", -1.0",
    }
    return f"{name}({x}{', u' if OPS[name].tensors == 2 else ''}{constants.get(name, '')})"


EVERY_OP = [_call(name) for name in OPS]
POWERS = ["g**2*u", "g**3", "g**(-2)", "g**0.5", "g**1.5", "g**(-0.5)", "g**0*u", "g**1", "g**100", "g**101"]
FIELD = ["g", "u", "g + u", "g - u", "g/u", "u/(g - 0.1)", "3.0 + u", "2.0", "g*sigmoid(2.0)", "maximum(g, 0.0)*u"]
PROGRAMS = [*EVERY_OP, *POWERS, *FIELD, *NAMED]


def expected(text, g, u, dh):
    """Value and gradients by torch; undefined gradients (a program without that input) are zero."""
    g, u = g.clone().requires_grad_(), u.clone().requires_grad_()
    h = pointwise.evaluate(pointwise.parse(text), {"g": g, "u": u})
    if not h.requires_grad:
        return h, torch.zeros_like(g), torch.zeros_like(u)
    grads = torch.autograd.grad(h, (g, u), dh, allow_unused=True)
    return h.detach(), *(torch.zeros_like(g) if x is None else x for x in grads)


def as_torch(text):
    """The generated lines as Python functions over torch tensors."""
    tl = SimpleNamespace(where=_where, **{n: getattr(torch, n) for n in ("abs", "erf", "exp", "exp2", "log2", "sqrt")})
    tl.sigmoid, tl.zeros_like = torch.sigmoid, torch.zeros_like
    names = {"tl": tl, "tanh": torch.tanh, "expm1": torch.expm1, "log1p": torch.log1p}
    value, grad = ("\n    ".join(lines) for lines in bodies(text))
    exec(f"def value(g, u):\n    {value}\ndef grad(g, u, dh):\n    {grad}", names)
    return names["value"], names["grad"]


def _where(condition, x, y):
    one = next(v for v in (x, y, torch.zeros(condition.shape, dtype=torch.float64)) if isinstance(v, torch.Tensor))
    x, y = (v if isinstance(v, torch.Tensor) else torch.full_like(one, v) for v in (x, y))
    return torch.where(condition, x, y)


def tame(expr, g, u):
    """Where no intermediate value is so large that the order of operations shows."""
    if not isinstance(expr, Call):
        return torch.ones_like(g, dtype=torch.bool)
    inside = functools.reduce(torch.logical_and, (tame(arg, g, u) for arg in expr.args))
    return inside & (pointwise.evaluate(expr, {"g": g, "u": u}).abs() < 1e5)


def assert_exact(text, g, u, dh):
    value, grad = as_torch(text)
    where = tame(pointwise.parse(text), g, u)
    for ours, theirs in zip((value(g, u), *grad(g, u, dh)), expected(text, g, u, dh), strict=True):
        # hardsigmoid's derivative in torch has a float32 constant
        torch.testing.assert_close(ours[where], theirs[where], rtol=1e-7, atol=1e-7, msg=lambda m: f"{text}: {m}")


programs = st.recursive(
    st.sampled_from(["g", "u", "0.5", "-1.25", "(g + u)"]),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from("+-*/"), inner),
        st.builds("{}**{}".format, inner.map(lambda x: f"({x})"), st.sampled_from(["2", "3", "(-1)", "0"])),
        st.builds(lambda name, x, y: _call(name, x).replace(", u", f", {y}"), st.sampled_from(list(OPS)), inner, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(programs)
def test_random_programs_agree_with_autograd(text):
    try:
        pointwise.canonical(text)
    except errors.BadActivation:  # 1/0, and the like
        return
    g = torch.tensor([-1.7, -0.4, 0.3, 1.1, 2.6], dtype=torch.float64)
    assert_exact(text, g, g.flip(0) * 0.7, g * 0.3 + 1.0)


@pytest.mark.parametrize("text", PROGRAMS)
def test_every_operation_agrees_with_autograd_at_its_kinks_too(text):
    g = torch.tensor(POINTS, dtype=torch.float64)
    for u in (g, g.flip(0) + 0.5):  # g = u ties maximum and minimum
        assert_exact(text, g, u, torch.linspace(-2.0, 2.0, len(POINTS), dtype=torch.float64))


def test_every_operation_has_a_row():
    assert set(ROWS) == {*OPS, "add", "mul", "div"}
    for name, op in OPS.items():
        assert len(ROWS[name].grads) == op.tensors, name


U = [math.sin(3.0 * i) + 0.01 for i in range(len(POINTS))]
DH = [1.0 + 0.1 * i for i in range(len(POINTS))]
TINY = [-1e-7 * 2.5**i for i in range(len(POINTS))]
ACCURATE = ["tanh(g)", "log1p(g)", "elu(g, 1.0)"]


@pytest.fixture(scope="module")
def interpreted():
    """{(program, inputs): (h, dg, du)} from one process whose Triton interprets."""
    nan = [math.nan] * len(POINTS)
    jobs = {(text, "points"): (POINTS, U, DH) for text in PROGRAMS}
    jobs |= {(text, "nan"): (nan, DH, DH) for text in EVERY_OP}
    jobs |= {(text, "tiny"): (TINY, DH, DH) for text in ACCURATE}
    run = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", str(Path(__file__).with_name("interpreted.py"))],
        input=json.dumps([[text, *inputs] for (text, _), inputs in jobs.items()]),
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return dict(zip(jobs, torch.tensor(json.loads(run.stdout), dtype=torch.float64), strict=True))


@pytest.mark.parametrize("text", PROGRAMS)
def test_inside_the_interpreter_every_program_agrees_in_float32(interpreted, text):
    inputs = [torch.tensor(v, dtype=torch.float32).double() for v in (POINTS, U, DH)]
    for ours, theirs in zip(interpreted[text, "points"], expected(text, *inputs), strict=True):
        within = ~(theirs.abs() > 1e30)  # g**100 leaves float32
        torch.testing.assert_close(ours[within], theirs[within], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("text", EVERY_OP)
def test_nan_stays_nan(interpreted, text):
    assert interpreted[text, "nan"][0].isnan().all()


@pytest.mark.parametrize("text", ACCURATE)
def test_small_arguments_keep_their_relative_accuracy(interpreted, text):
    x = torch.tensor(TINY, dtype=torch.float32).double()
    want, _, _ = expected(text, x, x, torch.ones_like(x))
    torch.testing.assert_close(interpreted[text, "tiny"][0], want, rtol=5e-7, atol=0.0)


def test_the_text_is_what_a_person_would_write():
    assert_expected_inline(
        source("silu(g)*u"),
        '''\
"""The pointwise program silu(g)*u and its gradient; written by moepass.kernels.codegen."""

import triton
import triton.language as tl


@triton.jit
def value(g, u):
    """h = silu(g)*u"""
    return g * tl.sigmoid(g) * u


@triton.jit
def grad(g, u, dh):
    """dg, du of h = silu(g)*u"""
    sigmoid = tl.sigmoid(g)
    dg = dh * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    du = dh * (g * sigmoid)
    return dg, du
''',
    )


def test_shared_parts_are_bound_once_and_deep_sums_stay_short():
    (value, grad) = bodies("gpt_oss")
    assert sum("tl.sigmoid" in line for line in grad) == 1
    assert all(len(line) < 110 for line in (*value, *grad))


@pytest.mark.parametrize(
    "text", ["g); import os; (u", "__import__('os')", "g.shape", "lambda: g", "g\n\nimport os", '"""']
)
def test_only_the_grammar_reaches_the_source(text):
    with pytest.raises(errors.BadActivation):
        pointwise_functions(text)


@pytest.mark.parametrize("text", ["g*1e300", "g + 1e-44"])
def test_constants_outside_float32_are_refused(text):
    with pytest.raises(errors.BadActivation, match="float32"):
        source(text)


def test_equal_programs_share_their_functions():
    assert pointwise_functions("swiglu").value is pointwise_functions("silu(g)*u").value
    assert pointwise_functions("swiglu").value is not pointwise_functions("geglu").value


def test_every_docstring_in_the_source_names_the_program():
    long = "+".join(["silu(g)*u"] * 60)
    assert max(map(len, source(long).splitlines())) <= 120
    assert re.search(r"def grad\(g, u, dh\)", source(long))
