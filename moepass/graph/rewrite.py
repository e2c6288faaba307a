"""Rewriting: a dense region becomes a router and ``moepass::experts``; an experts node becomes its lowering's op.

Contract
    in    an owned graph (``Capture``), a recognised ``DenseFFN``, a complete ``MoESpec``, the new parameters
    out   the region's output is computed by the semantic ops; new inputs stand behind the old ones, in the order of
          ``MoEOperands``; every new node carries ``meta["example_value"]`` of the graph's own fake mode
    never touches Dynamo's own graph, and removes no placeholder
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from moepass import _compat
from moepass.graph import values
from moepass.graph.capture import Capture, Chain, Path
from moepass.graph.site import DenseFFN
from moepass.spec import MoESpec


@dataclass(frozen=True)
class Inserted:
    """What a rewrite added: the semantic node, and per chain the position of the first new input."""

    experts: Node
    firsts: list[tuple[Chain, int]]


def rewrite_dense(
    capture: Capture, path: Path, site: DenseFFN, spec: MoESpec, tensors: Sequence[Tensor | None], prefix: str
) -> Inserted:
    """Replace a dense region by router and experts fed by new inputs.

    ``tensors``: router, w_in, w_out, b_in?, b_out? in this order.
    """
    body, call = capture.body(path), Emitter.of(capture, path)
    fakes = [_compat.fake_like(call.mode, t) for t in tensors if t is not None]
    added, firsts = capture.add_inputs(path, fakes, prefix)
    it = iter(added)
    operands = [next(it) if t is not None else None for t in tensors]
    with body.graph.inserting_before(site.output.next):
        experts, output = _emit(call, capture.replaced.get(site.x, site.x), site, spec, operands)
    capture.replaced[site.output] = output
    site.output.replace_all_uses_with(output, delete_user_cb=lambda user: user is not output)
    for node in sorted(site.interior, key=_order(body.graph), reverse=True):
        if not node.users and node.op != "placeholder":
            body.graph.erase_node(node)
    return Inserted(experts, firsts)


def _order(graph: fx.Graph) -> Callable[[Node], int]:
    position = {node: i for i, node in enumerate(graph.nodes)}
    return position.__getitem__


@dataclass(frozen=True)
class Emitter:
    """Adds call_function nodes with example values of the graph's own fake mode."""

    graph: fx.Graph
    mode: Any

    @classmethod
    def of(cls, capture: Capture, path: Path) -> Emitter:
        """For the graph at ``path``.  Raises ValueError where it carries no example values."""
        body = capture.body(path)
        mode = _compat.graph_fake_mode(body) or _compat.graph_fake_mode(capture.gm)
        if mode is None:
            raise ValueError("the graph carries no example values")
        return cls(body.graph, mode)

    def __call__(self, target: Callable[..., Any], *args: Any) -> Node:
        """Append a call where the graph is inserting."""
        node = self.graph.call_function(target, args)
        _compat.recompute_meta(node, self.mode)
        return node


def _emit(call: Emitter, x: Node, site: DenseFFN, spec: MoESpec, operands: Sequence[Node | None]) -> tuple[Node, Node]:
    router, w_in, w_out, b_in, b_out = operands
    ops, r = torch.ops.moepass, spec.router
    x_TD = x if _rank(x) == 2 else call(torch.reshape, x, (-1, site.D))
    logits = call(ops.router_logits.default, x_TD, router, None)
    routing = call(ops.route.default, logits, r.top_k, r.score, r.score_first, r.normalize, r.scale)
    index, weight = call(operator.getitem, routing, 0), call(operator.getitem, routing, 1)
    experts = call(
        ops.experts.default, x_TD, index, weight, w_in, w_out, b_in, b_out,
        spec.experts.activation, site.dropout, spec.dispatch.capacity_factor or 0.0, spec.dispatch.drop_policy, False,
    )  # fmt: skip
    if _rank(site.output) == 2:
        return experts, experts
    return experts, call(torch.ops.aten.view_as.default, experts, x)


def _rank(node: Node) -> int:
    held = values.tensor(node)
    if held is None:
        raise ValueError(f"node {node} carries no example value")
    return held.dim()


def retarget(node: Node, target: Callable[..., Any]) -> None:
    """Put a lowering's op (same schema) in the place of the semantic one."""
    node.target = target
