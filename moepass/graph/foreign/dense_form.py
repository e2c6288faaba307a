"""Transfer rules of the form that runs every expert on every token and lets the scores mask the rest (Llama-4).

``x.repeat(E, 1) * scores.T.reshape(-1, 1) -> view(E, T, D) -> bmm -> bmm -> sum over experts``, where ``scores [T, E]``
was scattered by a top-k: it is zero everywhere else, so only K experts a token count.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch.fx import Node

from moepass.graph import shapes, values
from moepass.graph.foreign.compute import covers
from moepass.graph.foreign.facts import Copies, EveryRow, Filled, Sparse
from moepass.graph.foreign.walk import Walk, known_equal, same_shape, shape, whole
from moepass.graph.vocabulary import CASTS, argument, name_of


def transfer(walk: Walk, node: Node, name: str) -> object | None:
    """The fact of a node of the dense form."""
    source = shapes.first(node)
    fact = walk.fact(source)
    if isinstance(fact, Sparse):
        return _scores(node, name, fact)
    if name == "scatter" and isinstance(fact, Filled):
        return _scattered(walk, node, fact)
    if name in ("repeat", "expand") and source is not None and fact is None:
        return _copies(walk, node, name, source)
    if isinstance(fact, EveryRow) and name in CASTS:
        held = values.tensor(node)
        return None if held is None else replace(fact, steps=(*fact.steps, held.dtype))
    return _scaled(walk, node) if name == "mul" else None


def _scattered(walk: Walk, node: Node, fact: Filled) -> Sparse | None:
    index, dim = argument(node, 2, "index"), argument(node, 1, "dim")
    sizes = shape(node)
    fills = fact.number == 0 or fact.number == -math.inf
    if not fills or not isinstance(index, Node) or len(sizes) != 2 or dim not in (1, -1) or "reduce" in node.kwargs:
        return None
    chosen = walk.origin(index)
    if len(shape(index)) != 2 or not known_equal(shape(index)[0], sizes[0]) or not _distinct(chosen):
        return None
    return Sparse(chosen, node, fact.number != 0)


def _distinct(index: Node) -> bool:
    """Whether no token chooses an expert twice: the indices of a top-k."""
    source = shapes.first(index)
    if source is None or name_of(source) != "topk" or name_of(index) != "getitem":
        return False
    return bool(index.args[1] == 1)


def _scores(node: Node, name: str, fact: Sparse) -> Sparse | None:
    if name in CASTS:
        return replace(fact, scores=node if not fact.turned else fact.scores)
    if name == "sigmoid" and fact.minus_inf and not fact.turned:
        return replace(fact, scores=node, minus_inf=False)
    if name == "softmax" and fact.minus_inf and not fact.turned and argument(node, 1, "dim") in (-1, 1):
        return replace(fact, scores=node, minus_inf=False)
    return replace(fact, turned=True) if shapes.swaps_matrix(node) and not fact.turned else None


def _copies(walk: Walk, node: Node, name: str, source: Node) -> Copies | None:
    """``x.repeat(E, 1)``, ``x[None].repeat(E, 1, 1)`` or ``x[None].expand(E, T, D)``."""
    before, after = shape(source), shape(node)
    x = walk.origin(source)
    if not shape(x) or not before or not known_equal(shape(x)[-1], before[-1]) or len(before) != len(after):
        return None
    if name == "expand":
        single = len(before) == 3 and known_equal(before[0], 1) and same_shape(before[1:], after[1:])
        experts: Any = after[0] if single else None
    else:
        times = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
        plain = len(times) == len(before) and all(t == 1 for t in times[1:])
        single = len(before) == 2 or (len(before) == 3 and known_equal(before[0], 1))
        experts = whole(times[0]) if plain and single else None
    return Copies(x, experts) if isinstance(experts, int) and experts > 1 else None


def _scaled(walk: Walk, node: Node) -> EveryRow | None:
    if len(node.args) != 2:
        return None
    for one, other in (node.args, node.args[::-1]):
        copies, scores = walk.fact(one), walk.fact(other)
        if not isinstance(copies, Copies) or not isinstance(scores, Sparse) or not isinstance(other, Node):
            continue
        if covers(node, other, scores) and same_shape(shape(one), shape(node)):
            held = values.tensor(node)
            return None if held is None else EveryRow(copies.x, copies.experts, scores, (held.dtype,))
    return None
