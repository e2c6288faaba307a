"""One pass over a graph in execution order that gives every node its fact.

A node that changes memory in place changes the facts of the names of that memory from then on, so that a rule never
asks whether it reads a tensor before or after a change: it reads what the walk holds at that moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from moepass import _compat
from moepass.graph import shapes, values, vocabulary
from moepass.graph.dataflow import Dataflow
from moepass.graph.foreign.facts import PAIRS, Ended, Ending, Lost, PairValue, Pieces, gemms_of
from moepass.graph.projection import Refusal
from moepass.graph.vocabulary import VIEWS, name_of

Rule = Callable[["Walk", Node, str], object | None]


class Walk:
    """The facts of one graph, its expert GEMMs (``anchors``), and the nodes that complete a site (``endings``)."""

    def __init__(self, flow: Dataflow, rules: tuple[Rule, ...]) -> None:
        self.flow, self.rules = flow, rules
        self.facts: dict[Node, object] = {}
        self.anchors: dict[Node, Refusal | None] = {}  # expert GEMMs, and why they are no part of a site
        self.endings: list[tuple[Node, Ending]] = []  # nodes that complete a site
        self._names: dict[Node, list[Node]] = {}
        for node in flow.graph.nodes:
            self._names.setdefault(flow.base(node), []).append(node)

    def run(self) -> Walk:
        """Walk the graph once."""
        for node in self.flow.graph.nodes:
            if node.op in ("call_function", "call_method"):
                self._visit(node)
        return self

    def _visit(self, node: Node) -> None:
        name = _name(node)
        fact = next((f for rule in self.rules if (f := rule(self, node, name)) is not None), None)
        if fact is None:
            fact = self._loss(node, name)
        fact = None if isinstance(fact, Ended) else fact
        for target in vocabulary.mutated(node):
            for alias in self._names[self.flow.base(target)]:
                self.facts.pop(alias, None)
            if fact is not None:
                self.facts[target] = fact
        if fact is not None:
            self.facts[node] = fact

    def _loss(self, node: Node, name: str) -> Lost | None:
        """Rows of a site that meet an operation without a rule are lost; the projections behind them know why."""
        lost = [f for source in node.all_input_nodes if (f := lost_from(self.facts.get(source), node, name))]
        if not lost or name in vocabulary.QUERIES:
            return None
        gemms = frozenset().union(*(f.gemms for f in lost))
        self.refuse(gemms, lost[0].refusal)
        return Lost(lost[0].refusal, gemms)

    def refuse(self, gemms: frozenset[Node], refusal: Refusal) -> None:
        """Give projections their reason, the first one they got."""
        for gemm in gemms:
            if self.anchors.get(gemm) is None:
                self.anchors[gemm] = refusal

    # --- questions that rules ask ---

    def fact(self, item: Any) -> Any:
        """What is known of a node; None for losses too."""
        found = self.facts.get(item) if isinstance(item, Node) else None
        return None if isinstance(found, Lost) else found

    def origin(self, node: Node) -> Node:
        """The node behind views (and, for integers, casts among integers) that hold no fact of their own."""
        while (source := shapes.first(node)) is not None and (is_view(node) or is_whole_cast(node)):
            node = source
        return node

    def ids(self, item: Any) -> PairValue | None:
        """``item`` as integers in an order: its fact, or itself in pair order."""
        if not isinstance(item, Node):
            return None
        fact = self.fact(item)
        if isinstance(fact, PairValue):
            return fact
        if fact is not None:
            return None
        while (source := shapes.first(item)) is not None and name_of(item) in vocabulary.CASTS and is_integer(source):
            item = source  # a histogram may want floats
        return PairValue(PAIRS, self.origin(item)) if is_integer(item) else None


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def is_integer(node: Node) -> bool:
    """Whether a node holds whole numbers."""
    held = values.tensor(node)
    return held is not None and held.dtype in INTEGERS


def lost_from(fact: object, node: Node, name: str) -> Lost | None:
    """What becomes of rows in an operation that no rule covers."""
    if isinstance(fact, Lost):
        return fact
    gemms = gemms_of(fact)
    if not gemms:
        return None
    spelled = vocabulary.spelled(node)
    return Lost(("moe_not_understood", f"{spelled} ({name or 'outside torch'}) at {node.name}"), gemms)


def _name(node: Node) -> str:
    """The canonical name; ops of other libraries by their qualified name."""
    name = name_of(node)
    if name is None and node.op == "call_function":
        text = getattr(node.target, "_qualified_op_name", None) or getattr(node.target, "_name", None)
        name = str(text or "").removesuffix(".default")
    return name or ""


# --- shapes ----------------------------------------------------------------------------------------------------------


def is_view(node: Node) -> bool:
    """Whether a node holds its source's elements in the same order and dtype."""
    source = shapes.first(node)
    before, after = values.tensor(source), values.tensor(node)
    if before is None or after is None or before.dtype != after.dtype:
        return False
    name = name_of(node)
    if name in VIEWS or (name == "detach" and before.dtype in INTEGERS):
        return True
    if name != "getitem" or not known_equal(before.numel(), after.numel()):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(i is None or i is Ellipsis or (isinstance(i, slice) and i == slice(None)) for i in index)


def is_whole_cast(node: Node) -> bool:
    """Whether a node casts whole numbers to whole numbers, or does nothing."""
    source = shapes.first(node)
    before, after = values.tensor(source), values.tensor(node)
    if before is None or after is None or name_of(node) not in vocabulary.CASTS:
        return False
    return before.dtype == after.dtype or (before.dtype in INTEGERS and after.dtype in INTEGERS)


def shape(node: Any) -> tuple[int | torch.SymInt, ...]:
    """The shape of a node's example value; empty where it holds none."""
    held = values.tensor(node)
    return () if held is None else tuple(held.shape)


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every value of their symbols.  Installs no guard."""
    return _compat.known_equal(a, b)


def same_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two shapes are equal for every value of their symbols."""
    return len(a) == len(b) and all(known_equal(x, y) for x, y in zip(a, b, strict=True))


def whole(item: Any) -> int | torch.SymInt | None:
    """A whole number of the graph: a constant, or a scalar node's value."""
    held = values.value(item) if isinstance(item, Node) else item
    if isinstance(held, bool) or not isinstance(held, (int, torch.SymInt)):
        return None
    fixed = values.static(held)
    return held if fixed is None else fixed


def piece(fact: Any, index: Any) -> object | None:
    """One of several results."""
    return fact.items[index] if isinstance(fact, Pieces) and isinstance(index, int) else None
