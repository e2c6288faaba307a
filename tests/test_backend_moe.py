"""``torch.compile(moe_model, backend="moepass")``: existing MoE models of transformers, and nothing else to call.

Every family against transformers' eager loop, logits and the gradients of every parameter.
"""

from __future__ import annotations

import logging

import moe_forms
import pytest
import torch
from moe_zoo import FAMILIES, WITH_INTERFACE, build, inputs
from torch import nn

import moepass
from moepass import backend

TOLERANCE = 1e-5
TRACED = [*WITH_INTERFACE, "llama4_text"]  # the others loop in Python


@pytest.fixture
def reports(monkeypatch):
    """The report of every graph that the test compiles."""
    seen = []
    publish = backend._publish
    monkeypatch.setattr(backend, "_publish", lambda report, *rest: (seen.append(report), publish(report, *rest)))
    torch._dynamo.reset()
    return seen


def sites(reports, kind="moe"):
    return [site for report in reports for site in report.sites if site.kind == kind]


def compiled(model, inner="eager", *, fullgraph=True, dynamic=True, **options):
    options = {"inner": inner, **options}
    return torch.compile(model, backend="moepass", fullgraph=fullgraph, dynamic=dynamic, options=options)


def logits(model, name, T):
    given = inputs(name, T)
    if T > 1:
        torch._dynamo.mark_dynamic(given["input_ids"], 1)
    return model(**given, use_cache=False).logits


def one_layer(name, experts="grouped_mm"):
    """The smallest model of a family that still has experts."""
    alone = (
        {"block_size": 128}
        if name == "minimax"
        else {}
        if name in ("gemma4", "dbrx", "jetmoe")
        else {"num_hidden_layers": 1}
    )
    return build(name, experts, **alone)


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def assert_same_gradients(model, reference, tolerance=TOLERANCE):
    """The gradient of each parameter, on the scale of all gradients of its kind of layer."""
    for (name, mine), (_, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert_close(mine.grad, theirs.grad, tolerance)


# --- families --------------------------------------------------------------------------------------------------------


#: Whole models at every range of T: one with the experts interface, the one without.  The others' at one T and at 1; of
#: each, what T changes, which is the experts, is tested in ``test_experts_module_of_each_family_alone``.
EVERY_T = ("olmoe", "llama4_text")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "experts"), [*((n, "grouped_mm") for n in TRACED), ("olmoe", "batched_mm"), ("gpt_oss", "batched_mm")]
)
def test_family_gives_the_logits_and_gradients_of_transformers_eager_loop(name, experts, reports):
    model, reference = one_layer(name, experts), one_layer(name, "eager")
    fast = compiled(model, dynamic=None)
    for T in (64, 5, 257) if name in EVERY_T else (64,):
        actual, expected = logits(fast, name, T), logits(reference, name, T)
        assert_close(actual, expected)
        probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(T))
        (actual * probe).sum().backward()
        (expected * probe).sum().backward()
    assert_same_gradients(model, reference)
    with torch.no_grad():
        assert_close(logits(fast, name, 1), logits(reference, name, 1))
    found = sites(reports)
    assert {site.status for site in found} == {"lowered"}
    assert len({site.id for site in found}) == model.config.num_hidden_layers
    assert len(reports) <= 4  # at most three ranges of T, and T = 1 without gradients
    assert all(site.id.endswith("experts") for site in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_INTERFACE)
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_experts_module_of_each_family_alone(name, experts, reports):
    """The same with the experts as a graph of their own, which is quick enough for every T and both forms."""
    model = one_layer(name, "eager")
    module = next(m for m in model.modules() if hasattr(m, "has_gate"))
    parameters = list(module.parameters())
    D, E = model.config.hidden_size, parameters[0].shape[0]
    router = torch.randn(D, E, generator=torch.Generator().manual_seed(0)) * D**-0.5

    def run(x):
        weight, index = torch.topk(torch.softmax(x @ router, -1), 2)
        return module(x, index, weight)

    fast = compiled(run, dynamic=None)
    for T in (64, 5, 257, 1):
        x = torch.randn(T, D, generator=torch.Generator().manual_seed(T), requires_grad=True)
        if T > 1:
            torch._dynamo.mark_dynamic(x, 0)
        outputs = []
        for implementation, call in (("eager", run), (experts, fast)):
            module.config._experts_implementation = implementation
            outputs.append(call(x))
        assert_close(outputs[1], outputs[0])
        theirs, mine = (torch.autograd.grad(y.square().sum(), [x, *parameters]) for y in outputs)
        for a, b in zip(mine, theirs, strict=True):
            assert_close(a, b)
    assert {s.status for s in sites(reports)} == {"lowered"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in TRACED])
def test_family_whose_loop_breaks_the_graph_is_reported_with_what_to_do(name, reports):
    model = build(name)
    with torch.no_grad():
        assert_close(logits(compiled(model, fullgraph=False), name, 7), logits(model, name, 7))
    found = sites(reports)
    assert found
    assert {(s.status, s.reason) for s in found} == {("skipped", "eager_loop")}
    assert all("existing=True" in s.hint for s in found)


@pytest.mark.slow
def test_transformers_own_eager_loop_is_reported_too(reports):
    model = build("olmoe", "eager", num_hidden_layers=1)
    with torch.no_grad():
        compiled(model, fullgraph=False)(**inputs("olmoe", 7), use_cache=False)
    assert [s.reason for s in sites(reports)] == ["eager_loop"]
    assert "set_experts_implementation" in sites(reports)[0].hint


@pytest.mark.slow
def test_through_inductor(reports):
    """Of the family with the most of a block: biases, interleaved rows, a program with constants."""
    name = "gpt_oss"
    model, reference = build(name, num_hidden_layers=1), build(name, "eager", num_hidden_layers=1)
    fast = compiled(model, "inductor", dynamic=None)
    actual, expected = logits(fast, name, 64), logits(reference, name, 64)
    assert_close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(model, reference)
    assert [s.status for s in sites(reports)] == ["lowered"]


# --- one layer is enough for the rest --------------------------------------------------------------------------------


class Block(nn.Module):
    """Router, experts in a form, and a shared dense expert."""

    def __init__(self, form=moe_forms.sorted_rows, shared=True):
        super().__init__()
        *_, w_in, w_out = moe_forms.arguments()
        self.form = form
        self.router = nn.Linear(moe_forms.D, moe_forms.E, bias=False)
        self.experts = nn.Module()
        self.experts.w_in, self.experts.w_out = w_in, w_out
        self.shared = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)) if shared else None

    def forward(self, x):
        weight, index = torch.topk(torch.softmax(self.router(x), -1), moe_forms.K)
        y = self.form(x, index, weight, self.experts.w_in, self.experts.w_out)
        return y if self.shared is None else y + self.shared(x)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(12, moe_forms.D)


def test_dense_blocks_of_a_moe_model_stay_dense_unless_asked_for(reports, x):
    block = Block()
    assert_close(compiled(block)(x), block(x))
    assert [(s.id, s.reason) for s in sites(reports, "dense_ffn")] == [("shared", "moe_model")]
    assert [(s.id, s.status) for s in sites(reports)] == [("experts", "lowered")]


@pytest.mark.parametrize(("convert", "status"), [(True, "lowered"), ("copy", "lowered"), (False, "skipped")])
def test_explicit_convert_holds_for_dense_blocks_only(convert, status, reports, x):
    block = Block()
    assert_close(compiled(block, convert=convert)(x), block(x))
    assert [s.status for s in sites(reports, "dense_ffn")] == [status]
    assert [s.status for s in sites(reports)] == ["lowered"]


def test_dense_models_are_converted_as_before(reports, x):
    block = Block().shared
    assert_close(compiled(block)(x), block(x))
    assert [s.status for s in sites(reports, "dense_ffn")] == ["lowered"]


def test_experts_behind_a_converted_block_read_its_result(reports, x):
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.moe = Block().shared, Block(shared=False)

        def forward(self, x):
            return self.moe(self.dense(x))

    stacked = Stacked()
    assert_close(compiled(stacked, convert=True)(x), stacked(x))
    assert [s.status for s in sites(reports)] == ["lowered"]
    assert [s.status for s in sites(reports, "dense_ffn")] == ["lowered"]


def test_weights_are_used_in_place_and_no_input_is_added(x):
    graphs = []

    def keep(gm, example_inputs):
        program = backend.transform(gm, example_inputs, backend.Options.parse({"inner": "eager"}))
        graphs.append((gm, program.capture.gm))
        return program.capture.gm.forward

    torch._dynamo.reset()
    torch.compile(Block(), backend=keep, fullgraph=True)(x)
    ((before, after),) = graphs
    names = [[n.name for n in g.graph.nodes if n.op == "placeholder"] for g in (before, after)]
    assert names[0] == names[1]
    (experts,) = [n for n in after.graph.nodes if "experts_" in str(n.target) and n.op == "call_function"]
    assert [n.op for n in experts.args[3:5]] == ["placeholder"] * 2


def test_prefill_and_decode_get_plans_of_their_own(reports):
    block = Block(shared=False)
    fast = compiled(block, dynamic=None)
    with torch.no_grad():
        for T in (256, 1):
            x = torch.randn(T, moe_forms.D)
            assert_close(fast(x), block(x))
    assert [s.workload.tokens for s in sites(reports)] == [256, 1]


def test_gradient_checkpointing_bodies_are_searched(reports, x):
    block = Block(shared=False)

    def forward(x):
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    reference = torch.autograd.grad(block(x).sum(), block.parameters())
    actual = compiled(forward, "aot_eager", dynamic=None)(x)
    assert [(s.id, s.status) for s in sites(reports)] == [("experts", "lowered")]
    for mine, theirs in zip(torch.autograd.grad(actual.sum(), block.parameters()), reference, strict=True):
        assert_close(mine, theirs)


def test_near_miss_is_reported_and_left_as_it_is(reports, x):
    def normed(x, index, weight, w_in, w_out):
        ids, rows = index.reshape(-1), x.repeat_interleave(2, dim=0)
        h = moe_forms.swiglu(torch.bmm(w_in[ids], rows.unsqueeze(-1)).squeeze(-1))
        y = nn.functional.rms_norm(torch.bmm(w_out[ids], h.unsqueeze(-1)).squeeze(-1), (8,))
        return (y * weight.reshape(-1, 1)).view(-1, 2, 8).sum(1)

    block = Block(normed)
    assert torch.equal(compiled(block)(x), block(x))
    assert [(s.id, s.status, s.reason) for s in sites(reports)] == [("experts", "skipped", "moe_combine")]
    assert "rms_norm" in sites(reports)[0].detail
    assert [s.reason for s in sites(reports, "dense_ffn")] == ["moe_model"]


def test_explain_shows_moe_sites(x):
    report = moepass.explain(Block())(x)
    assert {(s.id, s.kind, s.status) for s in report.sites} == {
        ("experts", "moe", "lowered"),
        ("shared", "dense_ffn", "skipped"),
    }


def test_plan_of_moe_sites_can_be_pinned(reports, x):
    block = Block(shared=False)
    compiled(block, dynamic=None)(x)
    torch._dynamo.reset()
    assert_close(compiled(block, dynamic=None, plan=reports[0], strict=True)(x), block(x))
    assert [s.decided_by for s in sites(reports)] == ["estimate", "pin"]


def test_separate_gate_and_up_are_joined_where_that_pays(reports):
    class Titan(nn.Module):
        def __init__(self, D=64, F=128, E=8):
            super().__init__()
            self.router = nn.Linear(D, E, bias=False)
            self.experts = nn.Module()
            for name, shape in (("w1", (E, F, D)), ("w2", (E, D, F)), ("w3", (E, F, D))):
                setattr(self.experts, name, nn.Parameter(torch.randn(shape) * 0.1))

        def forward(self, x):
            weight, index = torch.topk(torch.softmax(self.router(x), -1), 2)
            return moe_forms.torchtitan(x, index, weight, self.experts.w1, self.experts.w2, self.experts.w3)

    for model, T in ((Titan(), 512), (Titan(512, 1024), 1)):
        x = torch.randn(T, model.router.in_features)
        with torch.no_grad():
            assert_close(compiled(model, dynamic=None)(x), model(x))
    joined, left = sites(reports)
    assert (joined.status, "joined by a copy" in joined.hint) == ("lowered", True)
    assert (left.status, left.reason) == ("skipped", "weight_copy")


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_mixed_precision_is_as_exact_as_transformers_eager_loop(mode, reports):
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeExperts

    config = OlmoeConfig(hidden_size=32, intermediate_size=48, num_experts=8)
    torch.manual_seed(0)
    experts = OlmoeExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(64, 32)
    weight, index = torch.topk(torch.softmax(torch.randn(64, 8), -1), 2)
    config._experts_implementation = "eager"
    exact = experts(x, index, weight)
    if mode == "bfloat16":
        experts, x, weight = experts.bfloat16(), x.bfloat16(), weight.bfloat16()
    outputs = {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        config._experts_implementation = implementation
        run = experts if implementation == "eager" else compiled(experts, "aot_eager", dynamic=None)
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            outputs[implementation] = run(x, index, weight)
    error = {name: (y.float() - exact).abs().max() for name, y in outputs.items()}
    assert max(error.values()) <= 2 * error["eager"]
    assert {s.workload.dtype for s in sites(reports)} == {"bfloat16"}


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generate_with_a_static_cache_gives_eager_tokens(reports, caplog):
    model = build("olmoe", num_hidden_layers=1)
    prompt = inputs("olmoe", 9)
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    with caplog.at_level(logging.ERROR):
        expected = build("olmoe", "eager", num_hidden_layers=1).generate(**prompt, **settings)
        model.forward = torch.compile(model.forward, backend="moepass", options={"inner": "eager"}, dynamic=False)
        actual = model.generate(**prompt, **settings)
    assert torch.equal(actual, expected)
    lowered = [s for s in sites(reports) if s.status == "lowered"]
    assert sorted({s.workload.tokens for s in lowered}) == [1, 9]
    assert len({s.id for s in lowered}) == 1
