"""A recognised site by ``moepass::experts``: the same weights, in place, by views; the old region goes.

Weights on the output of the experts: ``experts(steps(x), index, weight)``.
Weights on their input: each (token, choice) is a row of its own, with one expert and weight one, summed over K after.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from moepass.graph import values, vocabulary
from moepass.graph.capture import Capture, Path
from moepass.graph.dataflow import Dataflow
from moepass.graph.foreign.facts import PairValue, Sparse, Stack
from moepass.graph.foreign.site import ForeignExperts, living
from moepass.graph.rewrite import Emitter


def rewrite_foreign(capture: Capture, path: Path, site: ForeignExperts, op: Callable[..., Any]) -> Node:
    """Compute the site by ``op`` (schema of ``moepass::experts``) and drop what nothing needs any more."""
    body = capture.body(path)
    call = Emitter.of(capture, path)
    flow = Dataflow(body.graph)
    site = _current(site, capture)
    alive = living(site, site.interior, flow)
    doomed = [node for node in site.interior if node not in alive]
    with body.graph.inserting_before(site.output.next):
        result = _emit(call, site, op)
    end = flow.position[site.output]
    for old in dict.fromkeys((site.output, *vocabulary.mutated(site.output))):
        capture.replaced[old] = result
        for user in [u for u in old.users if flow.position.get(u, -1) > end]:
            user.replace_input_with(old, result)
    for node in reversed(doomed):
        if not node.users and node.op != "placeholder":
            body.graph.erase_node(node)
    return result


def _emit(call: Emitter, site: ForeignExperts, op: Callable[..., Any]) -> Node:
    weights = (
        _joined(call, [_as_rows(call, g.stack) for g in site.ups]),
        _as_rows(call, site.down.stack),
        _joined(call, [g.bias for g in site.ups if g.bias is not None]),
        site.down.bias,
    )
    D = site.ups[0].stack.fan_in
    x = _flat(call, site.x, D)
    index = _flat(call, site.index, site.K)
    weight = None if site.weight is None else _by_token(call, site.weight, index, site.K)
    rest = (site.activation, site.dropout or 0, 0, "position", site.interleaved)
    if not site.weight_on_input:
        for step in site.steps:
            x = _cast(call, x, step.dtype)
        x = _cast(call, x, _dtype(site.ups[0].stack.node)) if not site.steps else x
        weight = _ones(call, x, index) if weight is None else weight
        y = call(op, x, index, weight, *weights, *rest)
    else:
        y = _on_input(call, site, op, x, index, weights, rest)
    return _as_before(call, y, site)


def _on_input(
    call: Emitter, site: ForeignExperts, op: Callable[..., Any], x: Node, index: Node, weights: Any, rest: Any
) -> Node:
    """Rows ``steps(x[t])`` for each choice, experts with K = 1, and the sum over the choices."""
    D, K = site.ups[0].stack.fan_in, site.K
    rows = call(torch.unsqueeze, x, 1)
    if site.every is not None:
        factor = call(torch.gather, site.every.scores, 1, index)
        rows = call(operator.mul, rows, call(torch.unsqueeze, factor, -1))
    for step in site.steps:
        if step.weight is not None:
            factor = _by_token(call, step.weight, index, K)
            rows = call(operator.mul, rows, call(torch.unsqueeze, factor, -1))
        else:
            rows = _cast(call, rows, step.dtype)
    rows = call(torch.reshape, rows, (-1, D))
    each = call(torch.reshape, index, (-1, 1))
    y = call(op, rows, each, _ones(call, rows, each), *weights, *rest)
    return y if K == 1 else call(torch.sum, call(torch.reshape, y, (-1, K, D)), 1)


# --- operands --------------------------------------------------------------------------------------------------------


def _as_rows(call: Emitter, stack: Stack) -> Node:
    """``[E, out, in]``, by a view where the stack lies the other way round."""
    return call(torch.transpose, stack.node, 1, 2) if stack.flipped else stack.node


def _joined(call: Emitter, nodes: list[Node]) -> Node | None:
    """Gate and up stacks, one after the other; separate parameters cost a copy."""
    if len(nodes) < 2:
        return nodes[0] if nodes else None
    return call(torch.cat, nodes, 1)


def _flat(call: Emitter, node: Node, width: int) -> Node:
    held = values.tensor(node)
    return node if held is not None and held.dim() == 2 else call(torch.reshape, node, (-1, width))


def _by_token(call: Emitter, weight: PairValue | Sparse, index: Node, K: int) -> Node:
    """Routing weights ``[T, K]``."""
    if isinstance(weight, Sparse):
        return call(torch.gather, weight.scores, 1, index)
    node = _flat(call, weight.source, K)
    held = values.tensor(node)
    if held is not None and values.static(held.shape[-1]) != K:
        node = call(torch.reshape, node, (-1, K))
    for dtype in weight.casts:
        node = _cast(call, node, dtype)
    return node


def _ones(call: Emitter, x: Node, index: Node) -> Node:
    held = values.tensor(x)
    dtype = torch.float64 if held is not None and held.dtype == torch.float64 else torch.float32
    return _cast(call, call(torch.ones_like, index), dtype)


def _cast(call: Emitter, node: Node, dtype: torch.dtype | None) -> Node:
    return node if dtype is None or _dtype(node) == dtype else call(torch.Tensor.to, node, dtype)


def _dtype(node: Node) -> torch.dtype | None:
    held = values.tensor(node)
    return None if held is None else held.dtype


def _as_before(call: Emitter, y: Node, site: ForeignExperts) -> Node:
    """In the shape and dtype of the node that is replaced, added onto the base where there is one."""
    before, after = values.tensor(site.output), values.tensor(y)
    y = _cast(call, y, None if before is None else before.dtype)
    if before is not None and after is not None and before.dim() != after.dim():
        y = call(torch.unsqueeze, y, 1)  # [T, 1, D] of a batched product
    return y if site.base is None else call(operator.add, site.base, y)


def _current(site: ForeignExperts, capture: Capture) -> ForeignExperts:
    """The site with nodes that earlier rewrites replaced put in the place of the old ones."""
    new = capture.replaced
    base = None if site.base is None else new.get(site.base, site.base)
    return replace(site, x=new.get(site.x, site.x), index=new.get(site.index, site.index), base=base)
