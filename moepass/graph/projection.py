"""Affine maps ``x @ W.T + b`` under all their spellings, slices of them, and whether their weights can be taken.

``Projections.at``    linear, addmm (GPT-2's Conv1D), mm / matmul / @ with a weight or its transpose, ``x @ w + b``
``Projections.slot``  the part of a projection that a node holds: a fused gate_up weight is cut by chunk, split, slices
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from moepass.graph import shapes, values
from moepass.graph.dataflow import Dataflow
from moepass.graph.site import Projection
from moepass.graph.vocabulary import argument, name_of


@dataclass(frozen=True)
class Affine:
    """One affine map.  ``nodes`` are all nodes it is made of, the last one holds its value."""

    x: Node
    weight: Node
    bias: Node | None
    transposed: bool
    in_features: int
    out_features: int
    nodes: tuple[Node, ...]

    @property
    def node(self) -> Node:
        """The node that holds the value."""
        return self.nodes[-1]


@dataclass(frozen=True)
class Slot:
    """Output features ``start:stop`` of an affine map."""

    affine: Affine
    start: int
    stop: int

    @property
    def width(self) -> int:
        """How many output features."""
        return self.stop - self.start

    def projection(self) -> Projection:
        """As the site keeps it."""
        a = self.affine
        return Projection(a.node, a.weight, a.bias, (self.start, self.stop), a.transposed)


class Projections:
    """The affine maps of one graph, read once."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self._found: dict[Node, Affine] = {}
        for node in flow.graph.nodes:
            affine = self._read(node)
            if affine is not None:
                self._found[node] = affine
        self.absorbed = frozenset(inner for a in self._found.values() for inner in a.nodes[:-1])

    def at(self, node: Node) -> Affine | None:
        """The affine map whose value ``node`` holds."""
        return self._found.get(node)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return (a for node, a in self._found.items() if node not in self.absorbed)

    def slot(self, node: Node) -> Slot | None:
        """The part of an affine map that ``node`` holds, through views and cuts of the last dimension; else None."""
        offset, width = 0, None
        while (affine := self.at(node)) is None:
            cut = shapes.cut(node)
            if cut is None:
                return None
            if cut.width is not None:
                width = cut.width if width is None else width
                offset += cut.start
            node = cut.source
        stop = affine.out_features if width is None else offset + width
        return Slot(affine, offset, stop)

    # --- reading ---

    def _read(self, node: Node) -> Affine | None:
        match name_of(node):
            case "linear":
                x, w = argument(node, 0, "input"), argument(node, 1, "weight")
                return self._affine(node, x, w, argument(node, 2, "bias"), stored_in_out=False)
            case "addmm":
                scaled = any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")) or len(node.args) > 3
                b, x, w = argument(node, 0, "input", "self"), argument(node, 1, "mat1"), argument(node, 2, "mat2")
                return None if scaled or not self._is_vector(b) else self._affine(node, x, w, b, stored_in_out=True)
            case "mm" | "matmul":
                x, w = argument(node, 0, "input", "self"), argument(node, 1, "other", "mat2", "tensor2")
                return self._affine(node, x, w, None, stored_in_out=True) if self._is_weight(w) else None
            case "add":
                return self._biased(node)
        return None

    def _affine(self, node: Node, x: object, w: object, b: object, *, stored_in_out: bool) -> Affine | None:
        held = values.tensor(w)
        if not isinstance(x, Node) or not isinstance(w, Node) or held is None or held.dim() != 2:
            return None
        sizes = [values.static(size) for size in held.shape]
        if sizes[0] is None or sizes[1] is None or not (b is None or isinstance(b, Node)):
            return None
        n_in, n_out = (sizes[0], sizes[1]) if stored_in_out else (sizes[1], sizes[0])
        weight, flipped = _storage(w)
        return Affine(x, weight, b, stored_in_out != flipped, n_in, n_out, (node,))

    def _biased(self, node: Node) -> Affine | None:
        """``x @ w + b`` with a vector parameter, where nothing else sees ``x @ w``."""
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
            return None
        for product, bias in (node.args, node.args[::-1]):
            inner = self.at(product) if isinstance(product, Node) else None
            if inner is None or inner.bias is not None or len(inner.node.users) != 1 or not isinstance(bias, Node):
                continue
            if self._is_vector(bias) and values.last_dim(bias) == inner.out_features:
                return Affine(inner.x, inner.weight, bias, inner.transposed, inner.in_features, inner.out_features,
                              (*inner.nodes, node))  # fmt: skip
        return None

    def _is_vector(self, node: object) -> bool:
        held = values.tensor(node)
        return held is not None and held.dim() == 1 and isinstance(node, Node) and node in self.flow.constants

    def _is_weight(self, node: object) -> bool:
        if not isinstance(node, Node):
            return False
        held = values.tensor(node)
        if held is None or held.dim() != 2:
            return False
        return node in self.flow.constants or _storage(node)[0].op in ("placeholder", "get_attr")


def _storage(w: Node) -> tuple[Node, bool]:
    """The tensor behind transposes and casts that change nothing, and whether it lies transposed."""
    flipped = False
    while True:
        source = w.all_input_nodes[0] if w.all_input_nodes else None
        if source is None:
            return w, flipped
        if shapes.swaps_matrix(w):
            flipped = not flipped
        elif not shapes.keeps_everything(w):
            return w, flipped
        w = source


# --- weights ---------------------------------------------------------------------------------------------------------

Refusal = tuple[str, str]


def refuse_weight(flow: Dataflow, node: Node) -> Refusal | None:
    """Why a weight or bias cannot be taken: (code, detail), or None where it is a plain dense floating parameter."""
    if node.op not in ("placeholder", "get_attr"):
        return "weight_not_parameter", f"{node.name} is computed in the graph"
    held = values.holder(node)
    if held is None:
        return "weight_not_parameter", f"{node.name} holds no tensor"
    if (refused := refuse_kind(node, held)) is not None:
        return refused
    if not flow.holds_parameter(node):
        return "weight_not_parameter", f"{node.name} is an input or a buffer"
    return None


def refuse_kind(node: Node, held: Tensor) -> Refusal | None:
    """Why a tensor cannot be a plain dense floating weight, by its kind alone."""
    what = f"{node.name}: {type(held).__name__} of {held.dtype}"
    lineage = {cls.__name__ for cls in type(held).__mro__}
    if "DTensor" in lineage:
        return "sharded_parameter", what
    if type(held) not in (Tensor, nn.Parameter) and "FakeTensor" not in lineage:
        quantised = any(word in type(held).__name__.lower() for word in ("quant", "4bit", "8bit", "int4", "int8"))
        return ("quantised_weight" if quantised else "tensor_subclass"), what
    if held.is_quantized or str(held.dtype).startswith("torch.float8"):
        return "quantised_weight", what
    if held.layout != torch.strided:
        return "sparse_weight", f"{what}, {held.layout}"
    if not held.dtype.is_floating_point:
        return "non_floating", what
    return None
