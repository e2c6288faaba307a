"""What an eager loop over experts leaves in the graphs around its breaks.

``expert_mask = one_hot(index, E).permute(2, 1, 0)`` whose sum is compared with zero (the head of HF's loop; ``nonzero``
breaks the graph), and ``split(rows, sizes)`` whose pieces meet ``weight[0]``, ``weight[1]``, ... (JetMoe).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from moepass.graph import shapes, values
from moepass.graph.dataflow import Dataflow
from moepass.graph.foreign.site import holders
from moepass.graph.site import Rejected
from moepass.graph.vocabulary import argument, name_of


def find(flow: Dataflow) -> Iterator[Rejected]:
    """One near miss for each loop that shows."""
    for node in flow.graph.nodes:
        name = name_of(node)
        if name == "one_hot" and (compared := _hits(node)) is not None:
            detail = f"{node.name} starts a loop over the experts that tokens hit"
            yield Rejected(compared, "eager_loop", detail, weights=holders([node]))
        if name == "cat" and (stack := _by_expert(node)) is not None:
            detail = f"{node.name} joins one product for each expert of {stack.name}"
            yield Rejected(node, "eager_loop", detail, weights=(stack,))


def _hits(one_hot: Node) -> Node | None:
    """The comparison in ``greater(one_hot(...).permute(2, 1, 0).sum((-1, -2)), 0)``, if it is there."""
    node, steps = one_hot, ("permute", "sum", "greater")
    for step in steps:
        following = [u for u in node.users if name_of(u) in ({step, "gt"} if step == "greater" else {step})]
        if not following:
            # the graph may end at the mask: three dimensions turned around mean experts first
            return node if step != "permute" and _reaches_output(node) else None
        node = following[0]
    return node


def _reaches_output(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _by_expert(cat: Node) -> Node | None:
    """The stack [E, out, in] whose slices multiply the pieces of one split, joined again by ``cat``."""
    pieces = argument(cat, 0, "tensors")
    if not isinstance(pieces, (list, tuple)) or len(pieces) < 2:
        return None
    stacks: list[Node] = []
    for piece in pieces:
        if not isinstance(piece, Node) or name_of(piece) not in ("linear", "mm", "matmul"):
            return None
        weight = argument(piece, 1, "weight", "mat2", "other")
        stack = _sliced(weight)
        if stack is None:
            return None
        stacks.append(stack)
    return stacks[0] if len(set(stacks)) == 1 else None


def _sliced(weight: object) -> Node | None:
    while isinstance(weight, Node):
        source = shapes.first(weight)
        held = values.tensor(source)
        if name_of(weight) in ("getitem", "select", "unbind") and held is not None and held.dim() == 3:
            return source
        if not shapes.swaps_matrix(weight) and name_of(weight) != "getitem":
            return None
        weight = source
    return None
