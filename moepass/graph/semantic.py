"""The semantic ops in a graph: where ``moepass::experts`` and ``experts_ep`` stand and what they are called with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from moepass.graph import values
from moepass.graph.capture import Capture, Path

OPERANDS = (
    "x_TD", "index_TK", "weight_TK", "w_in", "w_out", "b_in", "b_out",
    "activation", "dropout", "capacity_factor", "drop_policy", "interleaved",
)  # fmt: skip
PARALLEL_OPERANDS = (*OPERANDS, "groups", "form", "buffer_factor", "tokens", "mean", "tp", "chunks", "places", "shared")


@dataclass(frozen=True)
class SemanticExperts:
    """One ``moepass::experts`` (or ``experts_ep``) node and its operands by name."""

    path: Path
    node: Node
    operands: dict[str, Any]

    def tensor(self, name: str) -> Tensor:
        """The fake tensor behind a tensor operand."""
        held = values.tensor(self.operands[name])
        if held is None:
            raise ValueError(f"operand {name} of {self.node} carries no example value")
        return held

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: that of the result, which is the autocast dtype under autocast."""
        held: Any = values.value(self.node)
        held = held[0] if isinstance(held, tuple) else held
        return self.tensor("x_TD").dtype if held is None else held.dtype

    @property
    def shared(self) -> int:
        """Width of a shared expert of the same tokens (``moepass::feed_forward``); 0 where there is none."""
        x = self.operands["x_TD"]
        beside = (n for n in x.users if str(n.target).startswith("moepass.feed_forward") and n.args[0] is x)
        w_out = next((values.tensor(node.args[2]) for node in beside), None)
        return 0 if w_out is None else int(w_out.shape[1])


def find(capture: Capture) -> Iterator[SemanticExperts]:
    """Every semantic node, sub-graphs included."""
    for path, body in capture.bodies():
        for node in _nodes(body.graph):
            yield SemanticExperts(path, node, {**dict(zip(OPERANDS, node.args, strict=False)), **node.kwargs})


def find_parallel(capture: Capture) -> Iterator[SemanticExperts]:
    """Every ``moepass::experts_ep`` node, sub-graphs included."""
    for path, body in capture.bodies():
        for node in _nodes(body.graph, torch.ops.moepass.experts_ep):
            yield SemanticExperts(path, node, {**dict(zip(PARALLEL_OPERANDS, node.args, strict=False)), **node.kwargs})


def _nodes(graph: fx.Graph, op: Any = torch.ops.moepass.experts) -> list[Node]:
    targets = (op, op.default)
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def leftovers(gm: fx.GraphModule) -> list[str]:
    """Names of semantic nodes that no lowering replaced (there must be none after lowering)."""
    return [node.name for module in gm.modules() if isinstance(module, fx.GraphModule) for node in _nodes(module.graph)]
