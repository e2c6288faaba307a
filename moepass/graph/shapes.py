"""Shape-only operations, read by what they did to the example values rather than by their arguments.

``same_features``     the node keeps the values, their order and the last dimension (a view over leading dimensions)
``keeps_everything``  in addition nothing changed at all, or only the dtype was asked to stay what it is
``cut``               the node is a range of its source's last dimension
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch.fx import Node

from moepass.graph.values import dim_of, last_dim, same_sizes, static, tensor
from moepass.graph.vocabulary import CASTS, MOVES, VIEWS, argument, name_of


@dataclass(frozen=True)
class Cut:
    """Features ``start : start + width`` of ``source`` (all of them where width is None)."""

    source: Node
    start: int
    width: int | None


def same_features(node: Node) -> bool:
    """A view, contiguous or full slice that leaves the last dimension alone."""
    source = first(node)
    if source is None or not (name_of(node) in VIEWS or _is_full_index(node)):
        return False
    before, after = tensor(source), tensor(node)
    return before is not None and after is not None and before.dtype == after.dtype and (
        last_dim(source) is not None and last_dim(source) == last_dim(node)
    )  # fmt: skip


def same_cast(node: Node) -> bool:
    """``.to``, ``.float()`` and so on where dtype, device and shape stay."""
    source = first(node)
    if source is None or name_of(node) not in CASTS:
        return False
    before, after = tensor(source), tensor(node)
    if before is None or after is None:
        return False
    return (before.dtype, before.device) == (after.dtype, after.device) and same_sizes(before, after)


def keeps_everything(node: Node) -> bool:
    """The node is its source: same shape, same dtype, same values."""
    source = first(node)
    before, after = tensor(source), tensor(node)
    if before is None or after is None:
        return False
    return same_cast(node) or (same_features(node) and same_sizes(before, after))


def swaps_matrix(node: Node) -> bool:
    """The transpose of a matrix."""
    name, source = name_of(node), first(node)
    held = tensor(source)
    if held is None or held.dim() != 2 or name not in MOVES or source is None:
        return False
    if name in ("t", "get_T", "get_mT"):
        return True
    if name == "permute":
        dims = argument(node, 1, "dims")
        dims = dims if isinstance(dims, (list, tuple)) else node.args[1:]  # permute((1, 0)) or permute(1, 0)
        return tuple(dims) in {(1, 0), (-1, 0), (1, -2), (-1, -2)}
    if name in ("transpose", "swapaxes"):
        pair = argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1")
        return {dim_of(source, d) for d in pair} == {-1, -2}
    return False


def first(node: Node) -> Node | None:
    """The first argument where it is a node."""
    head = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    return head if isinstance(head, Node) else None


def strip(node: Node) -> Node:
    """The node behind views over leading dimensions and casts that change nothing."""
    while same_features(node) or same_cast(node):
        source = first(node)
        assert source is not None
        node = source
    return node


# --- cuts of the last dimension --------------------------------------------------------------------------------------


def cut(node: Node) -> Cut | None:
    """How ``node`` lies inside the features of its source, or None where it is no view or range of them."""
    source = first(node)
    if source is None:
        return None
    if same_features(node) or same_cast(node):
        return Cut(source, 0, None)
    match name_of(node):
        case "getitem" if isinstance(node.args[1], int):
            return _piece(node, source)
        case "getitem":
            return _sliced(node, source, *_last_slice(node, source))
        case "slice":
            step = argument(node, 4, "step", default=1)
            on_last = dim_of(source, argument(node, 1, "dim", default=0)) == -1 and step == 1
            bounds = argument(node, 2, "start"), argument(node, 3, "end")
            return _sliced(node, source, *(bounds if on_last else ("no", "no")))
        case "narrow":
            start, length = argument(node, 2, "start"), argument(node, 3, "length")
            on_last = dim_of(source, argument(node, 1, "dim")) == -1 and _whole(start) and _whole(length) and start >= 0
            return Cut(source, start, length) if on_last else None
    return None


def _piece(node: Node, pieces: Node) -> Cut | None:
    """``chunk(x, 2, -1)[i]`` and its relatives; the pieces' sizes are read from their example values."""
    name, source = name_of(pieces), first(pieces)
    held = pieces.meta.get("example_value", pieces.meta.get("val"))
    if name not in ("chunk", "split", "split_with_sizes", "tensor_split") or source is None:
        return None
    dim = argument(pieces, 2, "dim", default=0)
    if dim_of(source, dim) != -1 or not isinstance(held, (list, tuple)):
        return None
    widths = [static(piece.shape[-1]) for piece in held]
    if any(width is None for width in widths):
        return None
    sizes = [width for width in widths if width is not None]
    index = node.args[1]
    assert isinstance(index, int)
    starts = [0, *accumulate(sizes)]
    return Cut(source, starts[index % len(sizes)], sizes[index])


def _sliced(node: Node, source: Node, start: Any, stop: Any) -> Cut | None:
    size, width = last_dim(source), last_dim(node)
    if size is None or width is None or not all(b is None or _whole(b) for b in (start, stop)):
        return None
    low, high, _ = slice(start, stop).indices(size)
    return Cut(source, low, width) if high - low == width else None


def _last_slice(node: Node, source: Node) -> tuple[Any, Any]:
    """Bounds of ``x[..., a:b]``; a pair of strings where the index does anything else."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    held = tensor(source)
    covers = held is not None and (Ellipsis in index or len(index) == held.dim())
    if not covers or not index or not isinstance(index[-1], slice) or not all(map(_is_full, index[:-1])):
        return "no", "no"
    last = index[-1]
    return (last.start, last.stop) if last.step in (None, 1) else ("no", "no")


def _is_full_index(node: Node) -> bool:
    """``x[:]``, ``x[None]``, ``x[:, 0:]``: nothing picked, nothing dropped."""
    source = first(node)
    if name_of(node) not in ("getitem", "slice") or tensor(source) is None:
        return False
    before, after = tensor(source), tensor(node)
    if before is not None and after is not None and before.dim() == after.dim() and same_sizes(before, after):
        index = node.args[1] if name_of(node) == "getitem" else ()
        return all(_is_full(i) or _is_forward(i) for i in (index if isinstance(index, tuple) else (index,)))
    return name_of(node) == "getitem" and isinstance(node.args[1], tuple) and _only_adds_leading(node.args[1])


def _only_adds_leading(index: tuple[Any, ...]) -> bool:
    return all(i is None or _is_full(i) for i in index) and index[-1] is not None


def _is_forward(index: Any) -> bool:
    return isinstance(index, slice) and index.step in (None, 1)


def _is_full(index: Any) -> bool:
    return index is Ellipsis or (_is_forward(index) and index.start is None and index.stop is None)


def _whole(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)
