"""The dataflow view: dominators, post-dominators, effects, and its cost on large graphs."""

from __future__ import annotations

import time

import networkx as nx
import torch
import torch.nn.functional as nnf
from torch.fx import Graph, GraphModule
from tracing import D, F, parameter, traced

from moepass.graph.dataflow import Dataflow
from moepass.graph.dense import recognise
from moepass.graph.site import DenseFFN

X = torch.randn(3, D)


def flow_of(fn, *inputs):
    gm = traced(fn, *inputs)
    flow = Dataflow(gm.graph)
    return flow, {node.name: node for node in gm.graph.nodes}


def diamond(x, w):
    h = nnf.linear(x, w)
    return torch.relu(h) * torch.tanh(h)


def test_a_diamond_is_dominated_by_its_top_and_post_dominated_by_its_bottom():
    flow, n = flow_of(diamond, X, parameter(F, D))
    assert flow.dominates(n["linear"], n["mul"])
    assert flow.post_dominates(n["mul"], n["linear"])
    assert not flow.post_dominates(n["relu"], n["linear"])
    assert not flow.dominates(n["relu"], n["mul"])
    assert flow.dominates(n["x"], n["x"])


def test_parameters_do_not_count_as_activations():
    flow, n = flow_of(diamond, X, parameter(F, D))
    assert n["w"] in flow.constants
    assert flow.dominates(n["x"], n["linear"])
    flow, n = flow_of(diamond, X, torch.randn(F, D))
    assert not flow.dominates(n["x"], n["linear"])


def test_an_unused_branch_is_no_way_out_and_a_write_to_an_input_is():
    def unused(x, w):
        h = nnf.linear(x, w)
        torch.tanh(h)
        return torch.relu(h)

    def cached(x, w, cache):
        h = nnf.linear(x, w)
        cache.copy_(h)
        return torch.relu(h)

    flow, n = flow_of(unused, X, parameter(F, D))
    assert flow.post_dominates(n["relu"], n["linear"])
    flow, n = flow_of(cached, X, parameter(F, D), torch.zeros(3, F))
    assert not flow.post_dominates(n["relu"], n["linear"])


def test_views_and_in_place_results_share_their_base():
    def fn(x, w):
        h = nnf.linear(x, w)
        g, u = h.view(-1, F).chunk(2, -1)
        return g.relu_() * u

    flow, n = flow_of(fn, X, parameter(F, D))
    assert flow.base(n["relu_"]) is n["linear"]
    assert flow.mutators(n["getitem_1"]) == [n["relu_"]]
    assert flow.stale_use(n["relu_"]) is n["mul"]


def test_trees_agree_with_networkx_on_a_random_graph():
    torch.manual_seed(0)
    graph = Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(60):
        picks = torch.randint(max(0, len(nodes) - 6), len(nodes), (2,)).tolist()
        nodes.append(graph.call_function(torch.add, tuple(nodes[i] for i in picks)))
    graph.output(tuple(nodes[-2:]))
    flow = Dataflow(GraphModule({}, graph).graph)
    nodes = list(flow.graph.nodes)
    for a in nodes:
        cut = flow.digraph.copy()
        cut.remove_node(a)
        reached = nx.descendants(cut, "source")
        for b in nodes:
            if b in flow.digraph and b is not a and nx.has_path(flow.digraph, "source", b):
                assert flow.dominates(a, b) == (b not in reached)


def test_a_graph_of_thousands_of_nodes_is_read_in_seconds_and_linearly():
    def deep(layers):
        graph = Graph()
        x, up, down = (graph.placeholder(name) for name in ("x", "up", "down"))
        x.meta["val"], up.meta["val"], down.meta["val"] = X, parameter(F, D), parameter(D, F)
        wide = torch.randn(3, F)

        def emit(fn, value, *args):
            node = graph.call_function(fn, args)
            node.meta["val"] = value
            return node

        h = emit(torch.cumsum, X, x, 0)
        for _ in range(layers):
            norm = emit(nnf.layer_norm, X, h, (D,))
            hidden = emit(nnf.linear, wide, norm, up)
            act = emit(nnf.silu, wide, hidden)
            h = emit(torch.add, X, h, emit(nnf.linear, X, act, down))
        graph.output(h)
        gm = GraphModule({}, graph)
        start = time.process_time()
        found = recognise(gm)
        spent = time.process_time() - start
        assert len(found) == layers
        assert all(isinstance(site, DenseFFN) for site in found)
        return spent

    short, long = deep(200), deep(1600)
    assert long < 10
    assert long < 30 * max(short, 0.02)
