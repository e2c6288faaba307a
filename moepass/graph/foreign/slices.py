"""Variables of a program: whole input projections, and the cuts of them (halves, or every other feature)."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from moepass.graph import shapes, values
from moepass.graph.foreign.facts import Gemm, Hidden, Order, Part, Pieces
from moepass.graph.projection import Refusal
from moepass.graph.vocabulary import CUTS, argument, spelled
from moepass.pointwise import Var


def variable(gemm: Gemm, order: Order, start: int = 0, stop: int | None = None, step: int = 1) -> Hidden:
    """A part of a projection as a program of its own."""
    part = Part(gemm, start, gemm.stack.fan_out if stop is None else stop, step)
    name = f"{gemm.node.name}[{part.start}:{part.stop}:{step}]{'+b' if gemm.bias is not None else ''}"
    return Hidden(order, Var(name), ((name, part),))


def bare(fact: Hidden) -> Part | None:
    """The part that a program consists of, if it is nothing else."""
    return fact.parts[0][1] if isinstance(fact.expr, Var) and not fact.closed else None


def cut(node: Node, name: str, fact: Hidden) -> Hidden | Pieces | Refusal | None:
    """A range of the last dimension; None where the node is no cut."""
    if name not in CUTS | {"unbind", "select"}:
        return None
    source, part = shapes.first(node), bare(fact)
    refusal = "shape_not_understood", f"{spelled(node)} at {node.name} cuts the rows of the experts"
    if source is None or part is None or values.last_dim(source) != part.width or part.step != 1:
        return refusal
    if name in ("chunk", "split", "split_with_sizes", "tensor_split"):
        return _pieces(node, source, part, fact.order) or refusal
    bounds = _bounds(node, name, source)
    if bounds is None:
        return refusal
    start, stop, step = slice(*bounds).indices(part.width)
    return variable(part.gemm, fact.order, part.start + start, part.start + stop, step)


def _pieces(node: Node, source: Node, part: Part, order: Order) -> Pieces | None:
    held = values.value(node)
    if values.dim_of(source, argument(node, 2, "dim", default=0)) != -1 or not isinstance(held, (list, tuple)):
        return None
    at, items = part.start, []
    for piece in held:
        width = values.static(piece.shape[-1])
        if width is None:
            return None
        items.append(variable(part.gemm, order, at, at + width))
        at += width
    return Pieces(tuple(items))


def _bounds(node: Node, name: str, source: Node) -> tuple[Any, Any, Any] | None:
    """Start, stop and step of ``x[..., a:b:s]``, ``slice`` or ``narrow`` on the last dimension."""
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        held = values.tensor(source)
        covers = held is not None and (Ellipsis in index or len(index) == held.dim())
        if not covers or not isinstance(index[-1], slice) or any(not _full(i) for i in index[:-1]):
            return None
        found = index[-1].start, index[-1].stop, index[-1].step
    elif name == "slice" and values.dim_of(source, argument(node, 1, "dim", default=0)) == -1:
        found = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step")
    elif name == "narrow" and values.dim_of(source, argument(node, 1, "dim")) == -1:
        start, length = argument(node, 2, "start"), argument(node, 3, "length")
        if not isinstance(start, int) or not isinstance(length, int) or start < 0:
            return None
        found = start, start + length, 1
    else:
        return None
    plain = all(b is None or (isinstance(b, int) and not isinstance(b, bool)) for b in found)
    return found if plain and (found[2] is None or found[2] > 0) else None


def _full(index: Any) -> bool:
    return index is Ellipsis or (isinstance(index, slice) and index == slice(None))
