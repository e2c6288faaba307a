"""The activation language: what it reads, that its normal form changes no number, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from moepass import errors, pointwise
from moepass.pointwise import OPS, Call, Const, Expr, Var, canonical, evaluate, fold, parse, unparse

#: Points where no operation below overflows, with both signs and both sides of the clamps.
G = torch.linspace(-3.1, 3.3, 41, dtype=torch.float64)
U = torch.linspace(2.7, -2.9, 41, dtype=torch.float64)
GELU_TANH = f"0.5*g*(1 + tanh({math.sqrt(2 / math.pi)!r}*(g + 0.044715*g**3)))"

numbers = st.sampled_from([-2.0, -1.0, -0.5, 0.044715, 0.5, 1.0, 1.702, 2.0, 7.0]).map(Const)
smooth = [name for name, op in OPS.items() if (op.tensors, op.constants) == (1, 0) and name not in {"sqrt", "log1p"}]


#: Products of these do not round, so they are equal in any order.
dyadic = st.sampled_from([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0]).map(Const)


def _grow(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.one_of(
        st.lists(inner, min_size=2, max_size=4).map(lambda args: Call("add", tuple(args))),
        st.lists(inner, min_size=2, max_size=4).map(lambda args: Call("mul", tuple(args))),
        st.builds(pointwise.sub, inner, inner),
        st.builds(pointwise.power, inner, st.sampled_from([2.0, 3.0])),
        st.builds(pointwise.div, inner, dyadic),
        st.builds(lambda name, x: Call(name, (x,)), st.sampled_from(smooth), inner),
        st.builds(lambda name, x, y: Call(name, (x, y)), st.sampled_from(["maximum", "minimum"]), inner, inner),
        st.builds(lambda x, lo: Call("clamp", (x, Const(-lo), Const(lo))), inner, st.sampled_from([0.5, 7.0])),
        st.builds(lambda name, x, c: Call(name, (x, c)), st.sampled_from(["clamp_max", "clamp_min"]), inner, dyadic),
        inner.map(lambda x: Call("mul", (x, Call("sigmoid", (x,))))),
    )


def _expressions(constants: st.SearchStrategy[Const]) -> st.SearchStrategy[Expr]:
    return st.recursive(st.one_of(st.sampled_from([Var("g"), Var("u")]), constants), _grow, max_leaves=8)


expressions = _expressions(numbers)


def values(expr: Expr | str) -> torch.Tensor:
    return evaluate(parse(expr) if isinstance(expr, str) else expr, {"g": G, "u": U})


def folded(expr: Expr) -> str:
    """The normal form's text; expressions whose constants overflow are refused by ``canonical`` and left out here."""
    try:
        return canonical(unparse(expr))
    except errors.BadActivation:
        assume(False)
        raise


@given(expressions)
def test_text_is_read_back_as_the_same_function(expr):
    assume(len(unparse(expr)) <= 2000)
    folded(expr)
    torch.testing.assert_close(values(unparse(expr)), values(expr), rtol=1e-9, atol=1e-9, equal_nan=True)


@given(expressions)
def test_the_normal_form_computes_the_same_numbers(expr):
    wanted = values(expr)
    assume(bool((wanted.abs() < 1e6).all()))
    torch.testing.assert_close(values(folded(expr)), wanted, rtol=1e-6, atol=1e-6)


@given(expressions)
def test_the_normal_form_is_its_own_normal_form(expr):
    text = folded(expr)
    assert canonical(text) == text


@given(
    st.lists(_expressions(dyadic), min_size=2, max_size=4), st.sampled_from(["add", "mul"]), st.permutations(range(4))
)
def test_the_order_of_a_sum_or_product_does_not_matter(args, op, order):
    shuffled = [args[i] for i in order if i < len(args)]
    assert folded(Call(op, tuple(args))) == folded(Call(op, tuple(shuffled)))


@pytest.mark.parametrize(
    ("spelled", "named"),
    [
        (GELU_TANH, "gelu_tanh(g)"),
        ("0.5*g*(1.0 + tanh(0.7978845608028654*(g + 0.044715*(g*g*g))))", "gelu_tanh(g)"),
        (f"g*0.5*(erf(g/{math.sqrt(2)!r}) + 1)", "gelu(g)"),
        (f"g*(1 + erf(g*{math.sqrt(0.5)!r}))/2", "gelu(g)"),
        ("g*sigmoid(g)*u", "silu(g)*u"),
        ("u*(g/(1 + exp(-g)))", "silu(g)*u"),
        ("relu(g)*relu(g)", "relu(g)**2"),
        ("clamp_min(g, 0)**2", "relu(g)**2"),
        ("relu(g)**2.0", "relu(g)**2"),
        ("relu2", "relu(g)**2"),
        ("silu", "silu(g)"),
        ("(2*relu(g))**2", "4.0*relu(g)**2"),
        ("g + 0 + u*1", "g + u"),
        ("-(-g)", "g"),
    ],
)
def test_known_spellings_get_one_name(spelled, named):
    assert canonical(spelled) == named
    torch.testing.assert_close(values(spelled), values(named), rtol=1e-12, atol=1e-12)


def test_a_spelling_with_another_constant_keeps_its_own_numbers():
    for text in (GELU_TANH.replace("0.044715", "0.0447"), "0.5*g*(1 + erf(g))", "g*sigmoid(1.702*g)", "g*sigmoid(u)"):
        assert "gelu" not in canonical(text)
        assert "silu" not in canonical(text)
        torch.testing.assert_close(values(canonical(text)), values(text), rtol=1e-12, atol=1e-12)


def test_transformers_own_spelling_of_gelu_is_the_named_one():
    from transformers.activations import NewGELUActivation

    torch.testing.assert_close(values("gelu_tanh"), NewGELUActivation()(G), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values(GELU_TANH), NewGELUActivation()(G), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "g.T", "g.__class__", "().__class__", "exec(g)", "__import__('os')", "os.system(g)",
        "lambda: g", "[g for g in u]",
        "[g]", "(g, u)", "{g: u}", "g if u else g", "g < u", "g and u", "not g", "~g", "+g", "g @ u", "g // u", "g % 2",
        "g[0]", "x", "gelu(g)(u)", "silu(*g)", "silu(x=g)", "silu(g, u)", "silu()", "clamp(g, u, 1)", "clamp(g, 1)",
        "g**u", "g**0.5j", "2j*g", "True*g", "g*False", "None", "'g'", "f'{g}'", "g := u", "g; u", "g = u", "",
        " ", "g +",
        "g\nu", "g\x00", "import os", "swiglu(g)", "1e999*g", "g**1e999", "9"*1000 + "*g", "g**(10.0**400)",
        "g**(0**-1)",
    ],
)  # fmt: skip
def test_anything_outside_the_grammar_is_refused(text):
    with pytest.raises(errors.BadActivation) as caught:
        parse(text)
    assert caught.value.code == "unknown_activation"
    assert "swiglu" in str(caught.value)


@pytest.mark.parametrize("text", ["(" * 900 + "g" + ")" * 900, "-" * 1900 + "g", "silu(" * 380 + "g" + ")" * 380])
def test_deep_nesting_is_refused_or_read_but_never_crashes(text):
    try:
        normal = canonical(text)
    except errors.BadActivation:
        return
    assert canonical(normal) == normal


def test_a_text_beyond_the_limit_is_refused_and_not_repeated_in_full():
    with pytest.raises(errors.BadActivation, match="longer than 2000") as caught:
        parse("g" + " + g" * 1000)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    ["g/0", "g*(1e300*1e300)", "g + (1e308 + 1e308)", "(0*1.0)**-1*g", "g*(1e200**2)", "(-2.0)**0.5*g"],
)
def test_constants_that_are_not_finite_are_refused(text):
    with pytest.raises(errors.BadActivation, match="constants cannot be folded"):
        canonical(text)
    with pytest.raises(errors.BadActivation, match="constants cannot be folded"):
        pointwise.apply(text, G)


@pytest.mark.parametrize(("name", "expression"), pointwise.NAMED.items())
def test_a_program_with_a_field_name_is_displayed_by_it(name, expression):
    assert pointwise.display_name(expression) == name
    assert pointwise.display_name(name) == name
    assert canonical(name) == canonical(expression)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("gelu(g)", "gelu"), ("g*sigmoid(g)", "silu"), ("u*silu(g)", "swiglu"), ("tanh(g)*u", "tanh(g)*u")],
)
def test_display_name_is_the_shortest_honest_one(text, shown):
    assert pointwise.display_name(text) == shown


def test_a_gated_program_has_two_inputs():
    assert [pointwise.n_inputs(t) for t in ("gelu", "relu2", "swiglu", "gpt_oss", "g*u", "silu(u)")] == [
        1,
        1,
        2,
        2,
        2,
        2,
    ]


@pytest.mark.parametrize(
    ("text", "bends"),
    [
        *((text, False) for text in ("g", "2*g + 1", "g/2", "g + u", "g*(2 - 1)", "g**1", "0.5")),
        *((text, True) for text in ("g*u", "g**2", "relu(g)", "g/(1 + u)", "swiglu", "clamp_max(g, 7)")),
    ],
)
def test_a_program_is_nonlinear_unless_it_is_a_linear_map(text, bends):
    assert pointwise.is_nonlinear(text) is bends


def test_flops_count_every_operation_once():
    assert pointwise.flops_per_element("relu(g)") == 1
    assert pointwise.flops_per_element("swiglu") == 2
    assert pointwise.flops_per_element("g") == 1


def test_gpt_oss_is_the_published_formula():
    gate, up = G.clamp(max=7.0), U.clamp(-7.0, 7.0)
    torch.testing.assert_close(values("gpt_oss"), (up + 1) * gate * torch.sigmoid(1.702 * gate))


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
@pytest.mark.parametrize("interleaved", [False, True])
def test_apply_splits_gate_and_up_along_any_dimension(dim, interleaved):
    gate, up = torch.randn(2, 6, 4, dtype=torch.float64).unbind(0)
    h = (
        torch.stack([gate, up], dim=dim % 2 + 1).flatten(dim % 2, dim % 2 + 1)
        if interleaved
        else torch.cat([gate, up], dim)
    )
    torch.testing.assert_close(pointwise.apply("swiglu", h, dim=dim, interleaved=interleaved), F.silu(gate) * up)


def test_apply_of_an_ungated_program_takes_every_row():
    h = torch.randn(3, 5)
    torch.testing.assert_close(pointwise.apply("relu2", h, dim=0, interleaved=True), torch.relu(h) ** 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("text", ["gelu", "gpt_oss", "relu(1.0)*g", "maximum(g, 0.5)", "minimum(0.1, u)", "0.5"])
def test_a_constant_never_changes_the_dtype(text, dtype):
    h = torch.randn(3, 8, dtype=dtype)
    assert pointwise.apply(text, h).dtype == dtype
    assert pointwise.apply(canonical(text), h).dtype == dtype


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_operation_is_the_torch_function_of_its_name(name):
    op = OPS[name]
    x = G.abs() if name in {"sqrt", "log1p"} else G
    constants = {"clamp": (-1.0, 1.0), "elu": (0.7,), "leaky_relu": (0.2,), "clamp_max": (0.3,), "clamp_min": (0.3,)}
    given = constants.get(name, ())
    wanted = {
        "clamp": lambda: torch.clamp(x, -1.0, 1.0),
        "clamp_max": lambda: torch.clamp_max(x, 0.3),
        "clamp_min": lambda: torch.clamp_min(x, 0.3),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
    }
    args = ", ".join([*("gu"[: op.tensors]), *map(repr, given)])
    got = evaluate(fold(parse(f"{name}({args})")), {"g": x, "u": U})
    function = getattr(torch, name, None) or getattr(F, name, None)
    tensors = (x, U)[: op.tensors]
    torch.testing.assert_close(got, wanted[name]() if name in wanted else function(*tensors, *given))
