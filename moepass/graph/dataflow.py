"""A dataflow view of one FX graph: dominators, post-dominators, effects and mode regions.

The view is a networkx ``DiGraph`` over the nodes that carry activations.  Parameters and what is computed from them
alone are left out, so that "x dominates y" means: y depends on no activation but through x.  A virtual source feeds
the graph's inputs; the output and every node with a side effect feed a virtual sink, so that "y post-dominates h"
means: nothing else ever sees h.  Both trees are computed once per graph (Cooper, Harvey and Kennedy 2001), on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
from torch.fx import Graph, Node

from moepass.graph import values, vocabulary

_SOURCE, _SINK = "source", "sink"


@dataclass(frozen=True)
class Dataflow:
    """``graph`` and the questions that recognition asks of it.  ``is_parameter`` is asked about placeholders only."""

    graph: Graph
    is_parameter: Callable[[Node], bool] | None = None

    @cached_property
    def position(self) -> dict[Node, int]:
        """Graph order."""
        return {node: i for i, node in enumerate(self.graph.nodes)}

    def holds_parameter(self, node: Node) -> bool:
        """Whether a placeholder or get_attr holds an ``nn.Parameter``."""
        if node.op == "placeholder" and self.is_parameter is not None:
            return self.is_parameter(node)
        return node.op in ("placeholder", "get_attr") and values.is_parameter(node)

    @cached_property
    def constants(self) -> frozenset[Node]:
        """Nodes that hold no activation: parameters, attributes, sizes, and what is computed from them alone."""
        found: set[Node] = set()
        for node in self.graph.nodes:
            if self._is_constant(node, found):
                found.add(node)
        return frozenset(found)

    def _is_constant(self, node: Node, known: set[Node]) -> bool:
        if node.op == "output":
            return False
        if values.is_scalar(node) or vocabulary.name_of(node) in vocabulary.QUERIES:
            return True
        if node.op == "placeholder":
            return self.holds_parameter(node)
        return all(source in known for source in node.all_input_nodes)

    @cached_property
    def digraph(self) -> nx.DiGraph[Any]:
        """Edges along which activations travel, between a virtual source and a virtual sink."""
        flow: nx.DiGraph[Any] = nx.DiGraph()
        flow.add_nodes_from((_SOURCE, _SINK))
        for node in self.graph.nodes:
            if node in self.constants:
                continue
            feeds = [source for source in node.all_input_nodes if source not in self.constants]
            flow.add_edges_from((source, node) for source in feeds)
            if not feeds:
                flow.add_edge(_SOURCE, node)
            if self._has_effect(node):
                flow.add_edge(node, _SINK)
        return flow

    def _has_effect(self, node: Node) -> bool:
        if node.op in ("output", "call_module"):
            return True
        if changed := vocabulary.mutated(node):
            return not node.users or any(self.base(t).op in ("placeholder", "get_attr") for t in changed)
        return node.op == "call_function" and not node.users and node.is_impure()

    @cached_property
    def _dominators(self) -> _Tree:
        return _Tree.of(self.digraph, _SOURCE)

    @cached_property
    def _post_dominators(self) -> _Tree:
        return _Tree.of(self.digraph.reverse(copy=False), _SINK)

    def dominates(self, a: Node, b: Node) -> bool:
        """Whether every activation that reaches ``b`` came through ``a``."""
        return self._dominators.above(a, b)

    def post_dominates(self, a: Node, b: Node) -> bool:
        """Whether everything that ever becomes of ``b`` goes through ``a``."""
        return self._post_dominators.above(a, b)

    def feeds(self, a: Node, b: Node) -> bool:
        """Whether ``b`` depends on ``a``.  Walks back from ``b`` to ``a``'s position only."""
        floor, stack, seen = self.position[a], [b], {b}
        while stack:
            node = stack.pop()
            if node is a:
                return True
            for source in node.all_input_nodes:
                if source not in seen and self.position[source] >= floor:
                    seen.add(source)
                    stack.append(source)
        return False

    # --- effects and modes ---

    @cached_property
    def _bases(self) -> dict[Node, Node]:
        bases: dict[Node, Node] = {}
        for node in self.graph.nodes:
            shares = vocabulary.mutated(node)[:1]
            if not shares and vocabulary.name_of(node) in vocabulary.ALIASING and node.all_input_nodes:
                shares = (node.all_input_nodes[0],)
            bases[node] = bases[shares[0]] if shares else node
        return bases

    def base(self, node: Node) -> Node:
        """The node whose memory ``node`` may share: views and in-place results resolved."""
        return self._bases[node]

    @cached_property
    def _mutators(self) -> dict[Node, list[Node]]:
        found: dict[Node, list[Node]] = {}
        for node in self.graph.nodes:
            for changed in vocabulary.mutated(node):
                found.setdefault(self.base(changed), []).append(node)
        return found

    @cached_property
    def _aliases(self) -> dict[Node, list[Node]]:
        found: dict[Node, list[Node]] = {}
        for node, base in self._bases.items():
            found.setdefault(base, []).append(node)
        return found

    def mutators(self, node: Node) -> list[Node]:
        """Nodes that change the memory of ``node`` in place, graph order."""
        return self._mutators.get(self.base(node), [])

    def aliases(self, node: Node) -> list[Node]:
        """Every name of the memory that ``node`` may share, graph order."""
        return self._aliases[self.base(node)]

    def stale_use(self, mutator: Node) -> Node | None:
        """A node that runs after ``mutator`` and still reads the changed memory under an older name."""
        at = self.position[mutator]
        for changed in vocabulary.mutated(mutator):
            for alias in self._aliases[self.base(changed)]:
                if self.position[alias] < at:
                    late = [user for user in alias.users if self.position[user] > at]
                    if late:
                        return late[0]
        return None

    @cached_property
    def _epochs(self) -> dict[Node, int]:
        epoch, epochs = 0, {}
        for node in self.graph.nodes:
            epoch += vocabulary.raw_name(node) in vocabulary.BORDERS
            epochs[node] = epoch
        return epochs

    def one_mode(self, nodes: Iterable[Node]) -> bool:
        """Whether no border of an autocast or grad-mode region lies between any two of the nodes."""
        return len({self._epochs[node] for node in nodes}) <= 1


@dataclass(frozen=True)
class _Tree:
    """A dominator tree, as the interval of pre-order numbers below each node."""

    interval: dict[Any, tuple[int, int]]

    @classmethod
    def of(cls, flow: nx.DiGraph[Any], root: str) -> _Tree:
        parents = nx.immediate_dominators(flow, root)
        children: dict[Any, list[Any]] = {}
        for node, parent in parents.items():
            if parent is not None and parent != node:
                children.setdefault(parent, []).append(node)
        interval: dict[Any, tuple[int, int]] = {}
        clock, stack = 0, [(root, False)]
        opened: dict[Any, int] = {}
        while stack:
            node, closing = stack.pop()
            if closing:
                interval[node] = (opened[node], clock)
                continue
            opened[node] = clock
            clock += 1
            stack.append((node, True))
            stack.extend((child, False) for child in children.get(node, ()))
        return cls(interval)

    def above(self, a: Any, b: Any) -> bool:
        """Whether ``a`` lies on the path from the root to ``b`` (a node is above itself)."""
        if a not in self.interval or b not in self.interval:
            return False
        start, stop = self.interval[a]
        return start <= self.interval[b][0] < stop
