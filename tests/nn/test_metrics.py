"""Routing metrics against loops over the definition; recording under compile and activation checkpointing."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moepass.nn
from moepass.nn import MoE
from moepass.nn.metrics import REDUCE, Metrics, capacity_drops, collect, log_metrics, routing_metrics
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec

D, E, K = 8, 4, 2


def moe_of(cf=None, **router):
    torch.manual_seed(0)
    experts = ExpertSpec(num_experts=E, intermediate_size=6, activation="swiglu")
    moe = MoE(
        D, MoESpec(router=RouterSpec(top_k=K, **router), experts=experts, dispatch=DispatchSpec(capacity_factor=cf))
    )
    with torch.no_grad():
        moe.router.weight.mul_(20)
    return moe


class Stack(nn.Module):
    """Two blocks, each under activation checkpointing if asked."""

    def __init__(self, checkpointed=False, cf=None):
        super().__init__()
        self.layers = nn.ModuleList([moe_of(cf), moe_of(cf)])
        self.checkpointed = checkpointed

    def forward(self, x):
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


def counts_of(index):
    return [sum(int(e) == expert for row in index for e in row) for expert in range(E)]


def test_metrics_equal_loops_over_their_definition():
    torch.manual_seed(1)
    scores = torch.rand(9, E, dtype=torch.float64)
    index = scores.topk(K).indices
    metrics = routing_metrics(index, scores, E, dropped=torch.tensor(3), padding_rows=5)
    counts = counts_of(index)
    assert metrics.tokens_per_expert.tolist() == counts
    assert (metrics.dropped_tokens, metrics.padding_rows) == (3, 5)
    mean = statistics.mean(counts)
    assert metrics.load_cv == pytest.approx(statistics.pstdev(counts) / mean, rel=1e-5)
    assert metrics.load_max_over_mean == pytest.approx(max(counts) / mean)
    assert metrics.dead_expert_fraction == counts.count(0) / E
    shares = [c / sum(counts) for c in counts if c]
    assert metrics.load_utilization == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)) / E, rel=1e-5)
    rows = (scores / scores.sum(-1, keepdim=True)).tolist()
    entropy = statistics.mean(-sum(p * math.log(p) for p in row) for row in rows)
    assert metrics.router_entropy == pytest.approx(entropy, rel=1e-5)
    assert metrics.router_utilization == pytest.approx(math.exp(entropy) / E, rel=1e-5)


def test_a_dead_expert_and_a_sure_router():
    index = torch.tensor([[0, 1]] * 6)
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 6)
    metrics = routing_metrics(index, scores, E)
    assert metrics.dead_expert_fraction == 0.5
    assert metrics.load_utilization == pytest.approx(0.5)
    assert metrics.load_max_over_mean == 2
    assert (metrics.router_entropy, metrics.router_utilization) == (0, 0.25)


def test_masked_tokens_and_sentinels_are_left_out():
    index = torch.tensor([[0, 1], [2, 3], [E, 1]])
    scores = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 1, 1], [1.0, 0, 0, 0]])
    mask = torch.tensor([True, False, True])
    metrics = routing_metrics(index, scores, E, mask=mask)
    assert metrics.tokens_per_expert.tolist() == [1, 2, 0, 0]
    assert metrics.router_entropy == 0
    everything = routing_metrics(index, scores, E)
    assert everything.router_entropy == pytest.approx(math.log(4) / 3)


def test_no_token_gives_finite_metrics():
    metrics = routing_metrics(torch.empty(0, K, dtype=torch.int64), torch.empty(0, E), E)
    assert all(torch.isfinite(value.float()).all() for value in metrics)
    assert metrics.dead_expert_fraction == 1
    assert metrics.load_cv == metrics.load_max_over_mean == metrics.load_utilization == 0


def test_capacity_drops_and_padding():
    dropped, padding = capacity_drops(torch.tensor([5, 0, 3, 2]), 3)
    assert (dropped, padding) == (2, 3 + 1)


def test_every_metric_has_a_way_to_be_reduced():
    assert set(REDUCE) == set(Metrics._fields)


def test_nothing_is_recorded_unless_asked():
    moe = moe_of()
    moe(torch.randn(5, D))
    assert not list(moe.buffers())
    with pytest.raises(moepass.errors.NotRecorded, match="record_metrics"):
        moe.metrics()


def test_a_module_keeps_the_metrics_of_its_last_forward():
    moe = moe_of()
    moe.record_metrics()
    names = set(moe.state_dict())
    assert names == set(moe_of().state_dict())  # buffers of a record are no weights
    for T in (5, 9):
        x = torch.randn(T, D)
        moe(x)
        before = moe.metrics()
        assert before.tokens_per_expert.tolist() == counts_of(moe.router(x)[0])
        assert before.dropped_tokens == 0
    moe(torch.randn(100, D))
    assert before.tokens_per_expert.sum() == 9 * K  # a metric is the reader's own tensor
    moe.record_metrics(False)
    assert not moe.recording


@pytest.mark.parametrize("cf", [0.5, 2.0])
def test_capacity_reports_what_it_dropped_and_padded(cf):
    moe = moe_of(cf)
    moe.record_metrics()
    x = torch.randn(16, D)
    moe(x)
    metrics, capacity = moe.metrics(), math.ceil(cf * 16 * K / E)
    counts = counts_of(moe.router(x)[0])
    assert metrics.tokens_per_expert.tolist() == counts
    kept = sum(min(c, capacity) for c in counts)
    assert metrics.dropped_tokens == sum(counts) - kept
    assert metrics.padding_rows == E * capacity - kept


#: Inductor with checkpointing alone: it compiles all that the case without it does.
COMPILERS = [
    *((name, checkpointed) for name in ("aot_eager", "moepass") for checkpointed in (False, True)),
    pytest.param("inductor", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("backend", "checkpointed"), COMPILERS)
def test_recording_survives_compile_and_checkpointing_in_one_graph_for_many_lengths(backend, checkpointed):
    torch.compiler.reset()
    options = {"options": {"inner": "aot_eager"}} if backend == "moepass" else {}
    model, eager = Stack(checkpointed, cf=0.75), Stack(cf=0.75)
    for stack in (model, eager):
        for layer in stack.layers:
            layer.record_metrics()
    graphs = []
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True, **options)
    for T in (12, 7, 33):
        x = torch.randn(T, D, requires_grad=True)
        y = compiled(x)
        y.square().sum().backward()
        torch.testing.assert_close(y, eager(x))
        for layer, reference in zip(model.layers, eager.layers, strict=True):
            for value, expected in zip(layer.metrics(), reference.metrics(), strict=True):
                torch.testing.assert_close(value, expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] == 1


def test_eager_checkpointing_leaves_the_metrics_of_the_forward():
    model = Stack(checkpointed=True)
    for layer in model.layers:
        layer.record_metrics()
    x = torch.randn(6, D, requires_grad=True)
    y = model(x)
    before = [layer.metrics() for layer in model.layers]
    y.sum().backward()
    for layer, metrics in zip(model.layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.metrics(), metrics, strict=True))


def test_collect_names_every_block_and_says_how_to_reduce():
    model = Stack()
    assert collect(model) == {}
    model.layers[1].record_metrics()
    model(torch.randn(5, D))
    found = collect(torch.compile(model, backend="eager"))
    assert set(found) == {f"layers.1.{name}" for name in Metrics._fields}
    value, reduce = found["layers.1.tokens_per_expert"]
    assert (value.sum(), reduce) == (5 * K, "sum")
    assert set(collect(model.layers[1])) == set(Metrics._fields)


@pytest.mark.parametrize("compiled", [False, True])
def test_logger_calls_back_after_every_forward_until_removed(compiled):
    torch.compiler.reset()
    model = Stack()
    model.layers[1].record_metrics()
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    seen = []
    handle = log_metrics(called, seen.append)
    for T in (5, 6):
        called(torch.randn(T, D))
    assert [entry["layers.0"]["tokens_per_expert"].sum() for entry in seen] == [10, 12]
    assert set(seen[0]) == {"layers.0", "layers.1"}
    handle.remove()
    handle.remove()
    called(torch.randn(5, D))
    assert len(seen) == 2
    assert [layer.recording for layer in model.layers] == [False, True]  # only what it had started
