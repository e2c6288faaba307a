"""What an FX node is known to hold: example values, static sizes, numbers, parameters.

Dynamo keeps fakes in ``meta["example_value"]`` (and the real input behind ``meta["grapharg"]``), torch.export in
``meta["val"]``.  Nothing here installs a guard, except ``number`` on a symbolic float that the graph computes with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from moepass.graph.vocabulary import Unsupported


def value(node: Node) -> Any:
    """The example value of a node, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def tensor(node: Any) -> Tensor | None:
    """The example tensor of a node, or None where it holds something else."""
    held = value(node) if isinstance(node, Node) else None
    return held if isinstance(held, Tensor) else None


def is_scalar(node: Node) -> bool:
    """Whether a node holds a Python or symbolic number."""
    return isinstance(value(node), (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def holder(node: Node) -> Tensor | None:
    """The tensor that a placeholder or get_attr stands for: the real one where it can be reached, else the fake."""
    if node.op == "get_attr":
        held = _attribute(node)
        return held if isinstance(held, Tensor) else tensor(node)
    example = getattr(node.meta.get("grapharg"), "example", None)
    return example if isinstance(example, Tensor) else tensor(node)


def is_parameter(node: Node) -> bool:
    """Whether a placeholder or get_attr is known to hold an ``nn.Parameter``."""
    return isinstance(holder(node), nn.Parameter) or isinstance(tensor(node), nn.Parameter)


def _attribute(node: Node) -> Any:
    held: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        if not hasattr(held, part):
            return None
        held = getattr(held, part)
    return None if isinstance(held, GraphModule) else held


def static(size: int | torch.SymInt) -> int | None:
    """A size as a plain number where the compiler has already fixed it; None for a symbol (no guard)."""
    if isinstance(size, torch.SymInt):
        fixed = size.node.maybe_as_int()
        return None if fixed is None else int(fixed)
    return int(size)


def last_dim(node: Any) -> int | None:
    """Static size of the last dimension, or None."""
    held = tensor(node)
    return static(held.shape[-1]) if held is not None and held.dim() > 0 else None


def same_sizes(a: Tensor, b: Tensor, *, leading: bool = False) -> bool:
    """Whether two shapes (or their leading dimensions) are equal, symbols compared by name."""
    xs, ys = (a.shape[:-1], b.shape[:-1]) if leading else (a.shape, b.shape)
    return len(xs) == len(ys) and all(static(x) == static(y) and str(x) == str(y) for x, y in zip(xs, ys, strict=True))


def number(item: Any) -> float:
    """A Python number, or a symbolic float of the graph (its value becomes a guard).  Raises ``Unsupported``."""
    held = value(item) if isinstance(item, Node) else item
    if isinstance(held, bool) or not isinstance(held, (int, float, torch.SymInt, torch.SymFloat)):
        raise Unsupported(f"{item} is not a number")
    try:
        return float(held)
    except Exception as error:  # an unbacked symbol: torch raises a private class
        raise Unsupported(f"{item} is not known at compile time") from error


def dim_of(node: Node, dim: Any) -> int | None:
    """A dimension argument counted from the end (-1 is the last), or None."""
    held = tensor(node)
    if held is None or not isinstance(dim, int):
        return None
    return dim if dim < 0 else dim - held.dim()
