"""find and decide on graphs of a few nodes: programs, spellings, and every reason code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from tracing import D, F, codes, error_of, parameter, traced

from moepass import pointwise
from moepass.graph.dataflow import Dataflow
from moepass.graph.dense import View, decide, find, recognise
from moepass.graph.site import DenseFFN
from moepass.pointwise import canonical

X = torch.randn(3, D)
UP, GATE, DOWN = (parameter(F, D), parameter(F, D), parameter(D, F))


def site_of(fn, *inputs) -> DenseFFN:
    """The one site of a traced function, checked to compute the same numbers."""
    gm = traced(fn, *inputs)
    found = recognise(gm)
    assert len(found) == 1, found
    assert isinstance(found[0], DenseFFN), found[0]
    if found[0].dropout == 0:
        assert error_of(gm, inputs, found) < 1e-5
    return found[0]


def ungated(act):
    return lambda x, w1, w2: nnf.linear(act(nnf.linear(x, w1)), w2)


def gated(merge):
    return lambda x, wg, wu, w2: nnf.linear(merge(nnf.linear(x, wg), nnf.linear(x, wu)), w2)


@pytest.mark.parametrize(
    ("act", "program"),
    [
        (torch.relu, "relu(g)"),
        (lambda h: nnf.relu(h, inplace=True), "relu(g)"),
        (lambda h: h.relu_(), "relu(g)"),
        (torch.ops.aten.relu_.default, "relu(g)"),
        (torch.ops.aten.gelu.default, "gelu(g)"),
        (lambda h: nnf.gelu(h, approximate="tanh"), "gelu_tanh(g)"),
        (lambda h: torch.square(torch.relu(h)), "relu(g)**2"),
        (lambda h: torch.relu(h) ** 2, "relu(g)**2"),
        (lambda h: h * torch.sigmoid(h), "silu(g)"),
        (lambda h: h * torch.sigmoid(1.702 * h), "g*sigmoid(1.702*g)"),
        (lambda h: 0.5 * h * (1.0 + torch.erf(h / 2**0.5)), "gelu(g)"),
        (lambda h: nnf.leaky_relu(h, 0.2), "leaky_relu(g, 0.2)"),
        (lambda h: nnf.elu(h, 0.5, True), "elu(g, 0.5)"),
        (lambda h: torch.ops.aten.elu.default(h, 0.5), "elu(g, 0.5)"),
        (lambda h: nnf.hardtanh(h, -2.0, 2.0), "clamp(g, -2.0, 2.0)"),
        (lambda h: h.clamp(min=0), "relu(g)"),
        (lambda h: h.clamp(max=3.0), "clamp_max(g, 3.0)"),
        (nnf.softplus, "softplus(g)"),
        (nnf.mish, "mish(g)"),
        (nnf.relu6, "relu6(g)"),
        (nnf.selu, "selu(g)"),
        (nnf.hardswish, "hardswish(g)"),
        (lambda h: 1 - torch.tanh(h), "-1.0*tanh(g) + 1.0"),
        (lambda h: torch.exp(h).neg(), "-1.0*exp(g)"),
        (lambda h: torch.relu(h).to(torch.float32).contiguous(), "relu(g)"),
        (lambda h: nnf.dropout(torch.relu(h), 0.3, False), "relu(g)"),
        (lambda h: torch.relu(h.view(1, 3, F)).view(-1, F), "relu(g)"),
        (lambda h: torch.maximum(h, torch.tanh(h)), "maximum(g, tanh(g))"),
    ],
)
def test_ungated_spelling_becomes_its_program(act, program):
    site = site_of(ungated(act), X, UP, DOWN)
    assert (site.program, site.n, site.D, site.F, site.dropout) == (canonical(program), 1, D, F, 0.0)


def test_every_unary_operation_of_the_language_is_recognised_as_itself():
    for name, row in pointwise.OPS.items():
        if row.tensors == 1 and row.constants == 0:
            assert site_of(ungated(row.fn), X, UP, DOWN).program == canonical(f"{name}(g)")


@pytest.mark.parametrize(
    ("merge", "program", "gate_first"),
    [
        (lambda a, b: nnf.silu(a) * b, "silu(g)*u", True),
        (lambda a, b: a * nnf.silu(b), "silu(g)*u", False),
        (lambda a, b: b * torch.sigmoid(b) * a, "silu(g)*u", False),
        (lambda a, b: a * b, "g*u", True),
        (lambda a, b: nnf.gelu(a / 2.0) * (b + 1.0), "(u + 1.0)*gelu(0.5*g)", True),
        (
            lambda a, b: (a.clamp(-7, 7) + 1) * (b.clamp(max=7) * torch.sigmoid(1.702 * b.clamp(max=7))),
            "(clamp(u, -7.0, 7.0) + 1.0)*clamp_max(g, 7.0)*sigmoid(1.702*clamp_max(g, 7.0))",
            False,
        ),
    ],
)
def test_the_gate_is_the_projection_under_the_nonlinearity(merge, program, gate_first):
    site = site_of(gated(merge), X, GATE, UP, DOWN)
    first = next(n for n in site.x.graph.nodes if n.op == "placeholder" and n.name == ("wg" if gate_first else "wu"))
    assert site.program == canonical(program)
    assert site.ups[0].weight is first


@pytest.mark.parametrize(
    "cut",
    [
        lambda h: h.chunk(2, dim=-1),
        lambda h: h.split(F, dim=-1),
        lambda h: torch.split(h, [F, F], 1),
        lambda h: (h[..., :F], h[:, F:]),
        lambda h: (h.narrow(-1, 0, F), h.narrow(1, F, F)),
        lambda h: h.view(1, 3, 2 * F).view(3, 2 * F).chunk(2, -1),
    ],
)
@pytest.mark.parametrize("gate", [0, 1])
def test_a_fused_gate_up_weight_gives_two_projections_with_rows(cut, gate):
    def fn(x, w, w2):
        parts = cut(nnf.linear(x, w))
        return nnf.linear(nnf.silu(parts[gate]) * parts[1 - gate], w2)

    site = site_of(fn, X, parameter(2 * F, D), DOWN)
    assert site.program == "silu(g)*u"
    assert [p.rows for p in site.ups] == [(gate * F, gate * F + F), (F - gate * F, 2 * F - gate * F)]
    assert site.ups[0].node is site.ups[1].node


def test_rows_survive_two_cuts_in_a_row():
    def fn(x, w, w2):
        _, rest = nnf.linear(x, w).split([D, 2 * F], -1)
        g, u = rest.chunk(2, -1)
        return nnf.linear(nnf.silu(g) * u, w2)

    site = site_of(fn, X, parameter(D + 2 * F, D), DOWN)
    assert [p.rows for p in site.ups] == [(D, D + F), (D + F, D + 2 * F)]


@pytest.mark.parametrize(
    ("project", "stored"),
    [
        (lambda x, w, b: torch.addmm(b, x, w), "in_out"),
        (lambda x, w, b: x @ w + b, "in_out"),
        (lambda x, w, b: b + torch.mm(x, w), "in_out"),
        (lambda x, w, b: torch.addmm(b, x, w.t()), "out_in"),
        (lambda x, w, b: torch.matmul(x, w.transpose(0, 1)) + b, "out_in"),
        (lambda x, w, b: x.matmul(w.permute(1, 0)).add(b), "out_in"),
        (lambda x, w, b: x @ w.T + b, "out_in"),
        (lambda x, w, b: nnf.linear(x, w.t(), b), "in_out"),
        (lambda x, w, b: torch.ops.aten.linear.default(x, w, b), "out_in"),
    ],
)
def test_every_spelling_of_an_affine_map_is_a_projection(project, stored):
    def fn(x, w1, b1, w2, b2):
        return project(torch.relu(project(x, w1, b1)), w2, b2)

    flip = stored == "in_out"
    up, down = (parameter(D, F), parameter(F, D)) if flip else (parameter(F, D), parameter(D, F))
    site = site_of(fn, X, up, parameter(F), down, parameter(D))
    names = [str(n) for p in (*site.ups, site.down) for n in (p.weight, p.bias)]
    assert names == ["w1", "b1", "w2", "b2"]
    assert (site.ups[0].transposed, site.down.transposed) == (flip, flip)
    assert (site.D, site.F, site.program) == (D, F, "relu(g)")


def test_the_region_holds_its_nodes_in_graph_order_and_nothing_else():
    def fn(x, wg, wu, w2):
        y = torch.tanh(x)
        return y + nnf.linear(nnf.silu(nnf.linear(y.view(-1, D), wg)) * nnf.linear(y.view(-1, D), wu), w2)

    site = site_of(fn, X, GATE, UP, DOWN)
    assert site.x.name == "tanh"
    assert [n.name for n in site.interior] == ["view", "linear", "silu", "view_1", "linear_1", "mul", "linear_2"]
    assert site.output.name == "linear_2"


def test_the_input_keeps_the_leading_dimensions_of_the_output():
    def fn(x, w1, w2):
        return nnf.linear(torch.relu(nnf.linear(x.view(2, 3, D), w1)), w2)

    site = site_of(fn, torch.randn(6, D), UP, DOWN)
    assert site.x.name == "view"


def test_native_dropout_counts_by_its_first_result_only():
    def fn(which):
        return ungated(lambda h: torch.ops.aten.native_dropout.default(torch.relu(h), 0.5, True)[which].float())

    (site,) = recognise(traced(fn(0), X, UP, DOWN))
    assert (site.program, site.dropout) == ("relu(g)", 0.5)
    assert codes(recognise(traced(fn(1), X, UP, DOWN))) == ["shape_not_understood"]


def test_dropout_of_whole_channels_is_not_dropout_of_elements():
    (found,) = recognise(traced(ungated(lambda h: torch.feature_dropout(h, 0.5, True)), X, UP, DOWN))
    assert found.code in ("not_pointwise", "unknown_activation")


def test_dropout_between_program_and_output_is_kept_with_its_probability():
    site = site_of(ungated(lambda h: nnf.dropout(torch.relu(h), 0.25, True)), X, UP, DOWN)
    assert (site.program, site.dropout) == ("relu(g)", 0.25)


def other(x):
    return torch.cumsum(x, 0)


def spelled_rms_norm(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_overlapping_blocks_keep_the_first():
    def fn(x, a, b, c):
        return nnf.linear(torch.relu(nnf.linear(torch.relu(nnf.linear(x, a)), b)), c)

    square = [parameter(D, D) for _ in range(3)]
    found = recognise(traced(fn, X, *square))
    assert codes(found) == ["site", "overlaps"]


def test_a_deep_mlp_gives_no_site_where_no_pair_returns_to_its_width():
    def fn(x, a, b, c):
        return nnf.linear(torch.relu(nnf.linear(torch.relu(nnf.linear(x, a)), b)), c)

    assert codes(recognise(traced(fn, X, UP, parameter(F, F), DOWN))) == ["width_changes", "width_changes"]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, wq, wk, wv, wo: nnf.linear(
            nnf.scaled_dot_product_attention(*(nnf.linear(x, w)[None] for w in (wq, wk, wv)))[0], wo
        ),
        lambda x, wq, wk, wv, wo: nnf.linear(
            torch.softmax(nnf.linear(x, wq) @ nnf.linear(x, wk).t(), -1) @ nnf.linear(x, wv), wo
        ),
        lambda x, wq, wk, wv, wo: nnf.linear(nnf.layer_norm(x + nnf.linear(other(x), wq), (D,)), wo),
        lambda x, wq, wk, wv, wo: nnf.linear(torch.tanh(x), wo),
        lambda x, wq, wk, wv, wo: nnf.linear(spelled_rms_norm(x + nnf.linear(other(x), wq)), wo),
    ],
    ids=["sdpa", "eager attention", "norm of a residual stream", "no projection at all", "spelled-out norm"],
)
def test_attention_and_projections_after_a_residual_stream_are_no_candidates(fn):
    assert recognise(traced(fn, X, *(parameter(D, D) for _ in range(4)))) == []


def test_a_function_that_merely_bears_a_known_name_is_unknown():
    def silu(h):
        return h * 2.0

    gm = traced(ungated(torch.relu), X, UP, DOWN)
    next(n for n in gm.graph.nodes if n.name == "relu").target = silu
    assert codes(recognise(gm)) == ["unknown_activation"]


def test_the_caller_decides_what_is_a_parameter():
    gm = traced(ungated(torch.relu), X, torch.randn(F, D), torch.randn(D, F))
    assert codes(recognise(gm)) == ["weight_not_parameter"]
    assert codes(recognise(gm, is_parameter=lambda n: n.name in ("w1", "w2"))) == ["site"]


def test_find_and_decide_leave_the_graph_alone():
    gm = traced(gated(lambda a, b: nnf.silu(a) * b), X, GATE, UP, DOWN)
    before = str(gm.graph)
    view = View(Dataflow(gm.graph))
    assert [type(decide(c, view)) for c in find(view)] == [DenseFFN]
    assert str(gm.graph) == before
