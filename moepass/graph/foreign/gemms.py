"""Expert GEMMs: a grouped GEMM over sorted rows, or a batched one whose weights were gathered row by row.

Every such node is an *anchor*: it becomes part of a site or gets a reason why not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from moepass.graph import shapes, values
from moepass.graph.foreign.facts import (
    EVERY,
    Copies,
    EveryRow,
    Gemm,
    Hidden,
    Lost,
    Offsets,
    Outcome,
    Picked,
    Rows,
    Stack,
    gemms_of,
)
from moepass.graph.foreign.slices import variable
from moepass.graph.foreign.walk import Walk, known_equal, shape
from moepass.graph.projection import Refusal
from moepass.graph.vocabulary import CASTS, MOVES, argument, name_of

#: Grouped GEMM ops ``(rows [R, in], weights [E, in, out], offs=ends of the experts' rows)``.
GROUPED = frozenset({"grouped_mm", "_grouped_mm", "transformers::grouped_mm_fallback"})


def grouped(walk: Walk, node: Node) -> object:
    """A grouped GEMM over rows sorted by expert."""
    return _anchored(walk, node, _grouped(walk, node))


def batched(walk: Walk, node: Node, name: str) -> object | None:
    """``bmm(rows, weight[ids])`` either way round, or ``bmm(every row, weight)``; None for any other product."""
    facts = [walk.fact(source) for source in node.all_input_nodes]
    picked = any(isinstance(fact, Picked) and len(shape(fact.node)) == 3 for fact in facts)
    routed = any(isinstance(fact, (Hidden, EveryRow, Copies)) for fact in facts)
    lost = any(isinstance(walk.facts.get(source), Lost) for source in node.all_input_nodes)
    if not picked and not routed:
        return None
    if name not in ("bmm", "matmul") or len(node.args) != 2:
        return _anchored(walk, node, ("moe_form", f"{name} at {node.name} with gathered expert weights"))
    if lost:
        return _anchored(walk, node, _behind(walk, node))
    return _anchored(walk, node, _picked(walk, node) if picked else _every(walk, node))


def _anchored(walk: Walk, node: Node, result: object | Refusal) -> object:
    walk.anchors.setdefault(node, None)
    if not isinstance(result, tuple):
        return result
    behind = frozenset().union(*(gemms_of(walk.facts.get(source)) for source in node.all_input_nodes), {node})
    refusal: Refusal = (str(result[0]), str(result[1]))
    walk.refuse(behind, refusal)
    return Lost(refusal, behind)


def _behind(walk: Walk, node: Node) -> Refusal:
    """Why the operands are lost."""
    lost = [f for source in node.all_input_nodes if isinstance(f := walk.facts.get(source), Lost)]
    return lost[0].refusal if lost else ("moe_form", f"{node.name} is no expert GEMM of a known form")


# --- grouped ---------------------------------------------------------------------------------------------------------


def _grouped(walk: Walk, node: Node) -> object | Refusal:
    rows, weight, offs = (argument(node, i, *n) for i, n in enumerate((("input", "mat_a", "self"), _W, ("offs",))))
    if argument(node, 3, "bias") is not None:
        return "moe_form", f"{node.name} has a bias argument"
    stack = stacked(weight)
    if stack is None:
        return "moe_form", f"{node.name} multiplies {shape(weight)}, which is no stack [E, in, out]"
    fact, ends = walk.fact(rows), walk.fact(offs)
    if isinstance(walk.facts.get(rows), Lost):
        return _behind(walk, node)
    if not isinstance(fact, (Rows, Hidden)):
        return "unknown_order", f"nothing proves which tokens {rows} holds"
    if not isinstance(ends, Offsets):
        return "offsets_not_proven", f"nothing proves that {offs} is the running sum of the experts' histogram"
    if fact.order.perm is None or ends.key is not fact.order.key:
        return "unknown_order", f"the rows of {rows} are not sorted by the ids that {offs} counts"
    if ends.experts != stack.experts:
        return "offsets_not_proven", f"{offs} counts {ends.experts} experts, the weights have {stack.experts}"
    return _projected(node, fact, stack, fact.order.key)


_W = ("weight", "mat_b", "mat2")


def _projected(node: Node, rows: Rows | Hidden | EveryRow | Copies, stack: Stack, key: Node | None) -> object:
    gemm = Gemm(node, rows, stack, key)
    if isinstance(rows, Hidden):
        return Outcome(rows.order, gemm, rows.weight)
    return variable(gemm, rows.order if isinstance(rows, Rows) else EVERY)


def stacked(weight: Any) -> Stack | None:
    """``[E, in, out]`` as a stack: transposes of the last two dimensions are read as strides."""
    held = values.tensor(weight)
    if held is None or held.dim() != 3:
        return None
    sizes = [values.static(size) for size in held.shape]
    if any(size is None for size in sizes):
        return None
    E, fan_in, fan_out = (int(size) for size in sizes if size is not None)
    node, flipped = weight, True
    while (source := shapes.first(node)) is not None and (swaps(node) or _idle(node)):
        flipped = flipped != swaps(node)
        node = source
    return Stack(node, flipped, E, fan_in, fan_out)


def swaps(node: Node) -> bool:
    """The transpose of each matrix of a stack."""
    name, source = name_of(node), shapes.first(node)
    held = values.tensor(source)
    if name not in MOVES or source is None or held is None or held.dim() != 3:
        return False
    if name == "get_mT":
        return True
    if name == "permute":
        dims = argument(node, 1, "dims")
        dims = dims if isinstance(dims, (list, tuple)) else node.args[1:]
        return tuple(d % 3 for d in dims if isinstance(d, int)) == (0, 2, 1)
    if name in ("transpose", "swapaxes"):
        pair = argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1")
        return {values.dim_of(source, d) for d in pair} == {-1, -2}
    return False


def swapped(walk: Walk, node: Node) -> Picked | None:
    """Gathered weights, transposed."""
    fact = walk.fact(shapes.first(node))
    return replace(fact, swapped=not fact.swapped) if isinstance(fact, Picked) and swaps(node) else None


def _idle(node: Node) -> bool:
    """A copy to other strides, or a cast that does nothing."""
    return name_of(node) == "contiguous" or (name_of(node) in CASTS and shapes.same_cast(node))


# --- batched ---------------------------------------------------------------------------------------------------------


def _picked(walk: Walk, node: Node) -> object | Refusal:
    left, right = argument(node, 0), argument(node, 1)
    weights_first = isinstance(walk.fact(left), Picked)
    weights, rows = (left, right) if weights_first else (right, left)
    picked, fact = walk.fact(weights), walk.fact(rows)
    if isinstance(walk.facts.get(rows), Lost):
        return _behind(walk, node)
    if not isinstance(picked, Picked) or not isinstance(fact, (Rows, Hidden)):
        return "unknown_order", f"nothing proves which tokens {rows} holds"
    if picked.order != fact.order:
        return "unknown_order", f"{rows} and {weights} are in different orders"
    single, sizes = (-1 if weights_first else -2), shape(rows)
    if len(sizes) != 3 or not known_equal(sizes[single], 1):
        return "moe_form", f"{node.name} multiplies rows of shape {sizes}"
    E, a, b = (values.static(size) for size in shape(picked.node))
    if E is None or a is None or b is None:
        return "moe_form", f"{picked.node.name} has no static shape"
    flipped = weights_first == picked.swapped  # [R, in, out] on the right, [R, out, in] on the left
    stack = Stack(picked.node, flipped, E, *((a, b) if flipped else (b, a)))
    return _projected(node, fact, stack, picked.key)


def _every(walk: Walk, node: Node) -> object | Refusal:
    rows, weight = argument(node, 0), argument(node, 1)
    fact, stack = walk.fact(rows), stacked(weight)
    every = isinstance(fact, (EveryRow, Copies)) or (isinstance(fact, Hidden) and fact.order == EVERY)
    if not every or not isinstance(fact, (EveryRow, Copies, Hidden)):
        return "moe_form", f"{node.name} multiplies the rows of the experts by {weight}"
    sizes = shape(rows)
    if stack is None or len(sizes) != 3 or not known_equal(sizes[0], stack.experts):
        return "moe_form", f"{node.name} multiplies rows of shape {sizes} by {shape(weight)}"
    if not isinstance(fact, Hidden) and fact.experts != stack.experts:
        return "moe_form", f"{rows} holds {fact.experts} copies for {stack.experts} experts"
    return _projected(node, fact, stack, None)
