"""Traps of the one-line form: names and seeds, options, training, shapes that come and go, failures and restarts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import WIDTH, D, Net, assert_close, compiled, fresh, statuses  # noqa: F401 -- fresh is a fixture
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import FAMILIES, build

import moepass
from moepass import _compat
from moepass.attach import attached_states
from moepass.backend import moepass_backend
from moepass.spec import ExpertSpec, InitSpec, MoESpec


class Counter:
    """The backend, counting its compiles."""

    def __init__(self) -> None:
        self.compiles = 0

    def __call__(self, gm, inputs, options=None):
        self.compiles += 1
        return moepass_backend(gm, inputs, options=options)


# --- names and seeds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_line_form_and_convert_name_and_seed_their_sites_alike(family):
    zoo = build(family, layers=2 if family in ("llama", "t5") else 1)  # further layers only count on
    model, converted = zoo.model, copy.deepcopy(zoo.model)
    with torch.no_grad():
        compiled(model, "eager", fullgraph=False, strict=True, convert=InitSpec(method="drop"))(**zoo.inputs(7))
    report = moepass.convert(converted, init="drop")
    sites = [site for site in moepass.last_plan().sites if site.status == "lowered"]
    assert sorted(id for site in sites for id in site.ids) == sorted(site.id for site in report.converted)
    attached = {state.recipe.site: state for _, state in attached_states(model)}
    for site in report.converted:
        ours, theirs = attached[site.id].moe, converted.get_submodule(site.where)
        for name, parameter in theirs.named_parameters():
            assert torch.equal(ours.get_parameter(name), parameter), (site.id, name)


# --- options ---------------------------------------------------------------------------------------------------------


def test_two_specs_keep_separate_states_and_equal_options_share_one():
    model, x = Net(1), torch.randn(64, D)
    few = MoESpec(experts=ExpertSpec(num_experts=4))
    one, two, same = compiled(model), compiled(model, spec=few), compiled(model)
    for fast in (one, two, same):
        assert_close(fast(x), model(x))
    sizes = [state.moe.w_in.shape[0] for _, state in attached_states(model)]
    assert sorted(sizes) == [4, 8]
    states = {state.moe.w_in.shape[0]: state.moe for _, state in attached_states(model)}
    two(x).sum().backward()
    assert all(p.grad is not None for p in states[4].parameters())
    assert all(p.grad is None for p in states[8].parameters())
    with torch.no_grad():
        states[8].w_out.mul_(2.0)
    assert torch.equal(one(x), same(x))
    assert not torch.allclose(one(x), two(x))


# --- training --------------------------------------------------------------------------------------------------------


def test_two_micro_batches_accumulate_to_the_gradient_of_one_large_batch():
    model, x = Net(), torch.randn(64, D)
    fast = compiled(model)
    fast(x).square().sum().backward()
    parameters = list(moepass.moe_parameters(model))
    whole = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    for half in x.chunk(2):
        fast(half).square().sum().backward()
    for p, expected in zip(parameters, whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-4)


def test_every_optimizer_step_is_seen_and_none_compiles_again():
    model, x = Net(1), torch.randn(64, D)
    counter = Counter()
    fast = torch.compile(model, backend=counter, options={"inner": "aot_eager"})
    fast(x).sum().backward()
    optimizer = torch.optim.SGD(moepass.moe_parameters(model), lr=0.01)
    outputs = []
    for _ in range(3):
        optimizer.zero_grad()
        y = fast(x)
        outputs.append(y.detach())
        y.sum().backward()
        optimizer.step()
    assert counter.compiles == 1
    assert outputs[0].sum() > outputs[1].sum() > outputs[2].sum()


def test_autocast_training_steps_agree_with_those_of_the_converted_model():
    model, x = Net(), torch.randn(64, D)
    converted = copy.deepcopy(model)
    moepass.convert(converted)
    fast = compiled(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fast(x)
    ours = torch.optim.SGD(moepass.moe_parameters(model), lr=0.05)
    theirs = torch.optim.SGD(
        [p for m in converted.modules() if isinstance(m, moepass.nn.MoE) for p in m.parameters()], lr=0.05
    )
    for _ in range(3):
        losses = []
        for step, optimizer in ((fast, ours), (converted, theirs)):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = step(x).float().square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=2e-2, atol=0.0)


def test_nested_checkpoints_find_and_train_both_ffns():
    model, x = Net(), torch.randn(64, D, requires_grad=True)

    def inner(x):
        return checkpoint(model.layers[1], x, use_reentrant=False)

    def run(x):
        x = x + checkpoint(model.layers[0], x, use_reentrant=False)
        return x + checkpoint(lambda h: inner(torch.sin(h)), x, use_reentrant=False)

    expected = run(x)
    actual = compiled(run)(x)
    assert_close(actual, expected)
    assert [status for status, _ in statuses()] == ["lowered", "lowered"]
    actual.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in moepass.moe_parameters(model))


def test_reentrant_checkpoints_compute_and_train():
    model, x = Net(), torch.randn(64, D, requires_grad=True)

    def run(x):
        for layer in model.layers:
            x = x + checkpoint(layer, x, use_reentrant=True)
        return x

    expected = run(x)
    actual = compiled(run, fullgraph=False)(x)
    assert_close(actual, expected)
    actual.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in moepass.moe_parameters(model))


# --- shapes ----------------------------------------------------------------------------------------------------------

SHAPES = [(2, 3), (3, 5), (4, 7), (2, 9), (5, 2)]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_dynamic_batch_and_sequence_compile_once_below_the_first_threshold(inner):
    model = Net(1)
    counter = Counter()
    fast = torch.compile(model, backend=counter, fullgraph=True, dynamic=True, options={"inner": inner})
    for shape in SHAPES:
        x = torch.randn(*shape, D)
        assert_close(fast(x), model(x))
    assert counter.compiles == 1
    assert statuses() == [("lowered", None)]


def test_marked_dynamic_dimensions_stay_dynamic():
    model = Net(1)
    counter = Counter()
    fast = torch.compile(model, backend=counter, fullgraph=True, dynamic=None, options={"inner": "aot_eager"})
    for shape in SHAPES:
        x = torch.randn(*shape, D)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        assert_close(fast(x), model(x))
    assert counter.compiles == 1


def test_alternating_shapes_compile_each_range_once():
    model = Net(1).eval()
    counter = Counter()
    fast = torch.compile(model, backend=counter, options={"inner": "aot_eager"})
    with torch.no_grad():
        for T in (8, 64, 2000, 16, 3000, 8, 2000, 64, 5, 2500):
            x = torch.randn(T, D)
            assert_close(fast(x), model(x))
    assert counter.compiles <= 1 + 3  # the first shape is static, then at most three ranges


# --- failures and restarts -------------------------------------------------------------------------------------------


def test_failure_of_the_inner_compiler_falls_back_to_the_untouched_graph(monkeypatch, caplog):
    model, x = Net(1), torch.randn(8, D)
    real, graphs = _compat.compile_with, []

    def fail_once(inner, gm, inputs, patches):
        graphs.append([n.target for n in gm.graph.nodes if n.op == "call_function"])
        if len(graphs) == 1:
            gm.graph.erase_node(gm.graph.output_node())
            raise RuntimeError("codegen failed")
        return real(inner, gm, inputs, patches)

    monkeypatch.setattr(_compat, "compile_with", fail_once)
    assert torch.equal(compiled(model)(x), model(x))
    assert len(graphs) == 2
    assert not any("moepass" in str(target) for target in graphs[1])
    assert statuses() == [("fallback", "internal_error")]
    assert "codegen failed" in caplog.text
    assert not list(attached_states(model))


class Leaky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D)
        self.slope = 0.3

    def forward(self, x):
        return self.down(F.leaky_relu(self.up(x), self.slope))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@torch.no_grad()  # a backward would be compiled for every value, and nobody runs it
def test_a_float_attribute_in_the_program_restarts_and_is_followed(inner):
    model, x = Leaky(), torch.randn(8, D)
    fast = compiled(model, inner, dynamic=True, strict=True)
    assert_close(fast(x), model(x))
    for slope in (0.7, 0.3):
        model.slope = slope
        assert_close(fast(x), model(x))
    assert statuses() == [("lowered", None)]
    assert "0.3" in moepass.last_plan().sites[0].activation or "0.7" in moepass.last_plan().sites[0].activation
