"""The captured graph as the backend owns it: a copy, with a way from any sub-graph out to the top-level inputs.

Sub-graphs are the bodies of higher-order ops: ``tag_activation_checkpoint(wrap_body_0, *operands)``,
``invoke_subgraph(body, name, *operands)``.  A *path* names nested bodies; a *chain* is one way of being called along a
path (a body may be called more than once).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.fx import Node

from moepass import _compat

Path = tuple[str, ...]
Chain = tuple[Node, ...]


@dataclass
class Capture:
    """An owned copy of Dynamo's graph and the example inputs that came with it."""

    gm: fx.GraphModule
    inputs: Sequence[Any]
    positions: dict[Node, int] = field(default_factory=dict)
    replaced: dict[Node, Node] = field(default_factory=dict)  # outputs of rewritten sites, which later sites may read

    @classmethod
    def of(cls, gm: fx.GraphModule, inputs: Sequence[Any]) -> Capture:
        """Copy the graph; the original stays untouched for the fallback."""
        copied = _compat.copy_dynamo_graph(gm)
        return cls(copied, inputs, {node: i for i, node in enumerate(placeholders(copied.graph))})

    def body(self, path: Path) -> fx.GraphModule:
        """The graph module at a path."""
        module: nn.Module = self.gm
        for name in path:
            module = getattr(module, name)
        assert isinstance(module, fx.GraphModule)
        return module

    def bodies(self) -> Iterator[tuple[Path, fx.GraphModule]]:
        """Every graph, outermost first."""
        return bodies(self.gm)

    def chains(self, path: Path) -> list[Chain]:
        """Every way in which the body at ``path`` is called, outermost call first; one empty chain for the top."""
        return _chains(self.gm, path)

    def outer(self, path: Path, chain: Chain, node: Node) -> Node:
        """The node outside all bodies that a body's placeholder stands for; other nodes stand for themselves."""
        for depth in reversed(range(len(path))):
            body = self.body(path[: depth + 1])
            inputs = placeholders(body.graph)
            if node not in inputs:
                return node
            operand = operands(chain[depth], body)[inputs.index(node)]
            if not isinstance(operand, Node):
                return node
            node = operand
        return node

    def value(self, path: Path, node: Node) -> Any:
        """The real example input behind a node (of the first chain), or None."""
        chains = self.chains(path)
        if not chains:
            return None
        position = self.positions.get(self.outer(path, chains[0], node))
        return None if position is None else self.inputs[position]

    def is_parameter(self, node: Node) -> bool:
        """Whether a node is an input that holds an nn.Parameter, through any nesting."""
        for path, body in self.bodies():
            if body.graph is node.graph:
                value = self.value(path, node)
                if value is not None and _compat.is_fake(value):
                    return "tensor_dict" in node.meta or isinstance(value, nn.Parameter)
                return isinstance(value, nn.Parameter)
        return False

    def add_inputs(self, path: Path, fakes: Sequence[Any], prefix: str) -> tuple[list[Node], list[tuple[Chain, int]]]:
        """New static inputs of the body at ``path``, threaded through every call on the way.

        Returns the body's placeholders, and for every chain the position of its first new top-level input.
        """
        body = self.body(path)
        added = [
            _compat.add_static_placeholder(body.graph, f"{prefix}_{i}", fake, top_level=not path)
            for i, fake in enumerate(fakes)
        ]
        if not path:
            return added, [((), len(placeholders(body.graph)) - len(added))]
        firsts: list[tuple[Chain, int]] = []
        for c, call in enumerate(calls(self.body(path[:-1]), path[-1])):
            operand_nodes, outer_firsts = self.add_inputs(path[:-1], fakes, f"{prefix}_c{c}")
            call.args = (*call.args, *operand_nodes)
            firsts.extend(((*chain, call), first) for chain, first in outer_firsts)
        return added, firsts


def placeholders(graph: fx.Graph) -> list[Node]:
    """The inputs of a graph in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def calls(gm: fx.GraphModule, name: str) -> list[Node]:
    """Nodes that call the sub-graph ``name`` (it is fetched by get_attr and passed as an argument)."""
    fetches = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name]
    return [user for fetch in fetches for user in fetch.users]


def operands(call: Node, body: fx.GraphModule) -> tuple[Any, ...]:
    """The arguments of a higher-order call that feed the body's placeholders: the last ones."""
    count = len(placeholders(body.graph))
    return call.args[len(call.args) - count :]


def bodies(gm: fx.GraphModule, path: Path = ()) -> Iterator[tuple[Path, fx.GraphModule]]:
    """A graph and the bodies of its higher-order ops by path, outermost first."""
    yield path, gm
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            yield from bodies(child, (*path, name))


def _chains(gm: fx.GraphModule, path: Path) -> list[Chain]:
    if not path:
        return [()]
    child = getattr(gm, path[0])
    return [(call, *rest) for call in calls(gm, path[0]) for rest in _chains(child, path[1:])]
