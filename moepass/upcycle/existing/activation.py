"""The activation of stacked experts, read from the function that computes it.

``read_activation(fn, width)`` traces ``fn: [T, width] -> [T, F]`` (``_apply_gate`` of transformers' experts, or an
``act_fn``) and gives the pointwise program and how gate and up stand in the ``width`` columns.  Which columns a tensor
holds is not guessed from the spelling of a cut: the cut is run on column numbers.  The program is then checked against
``fn`` by numbers, gradients included, so a wrong reading becomes a refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from moepass import _compat, errors, pointwise
from moepass.graph import vocabulary
from moepass.pointwise import Const, Expr, Var

#: Rows of the example; float32 checks agree to a few units in the last place.
_ROWS, _TOLERANCE = 5, 1e-5
#: Wide enough to meet the clamps in use (GPT-OSS cuts at 7).
_SPREAD = 6.0
#: Cuts and moves that are run on column numbers.
_MOVES = vocabulary.VIEWS | vocabulary.MOVES | vocabulary.CUTS


@dataclass(frozen=True)
class Activation:
    """``text``: canonical program over g and u; ``interleaved``: gate and up columns alternate (GPT-OSS)."""

    text: str
    interleaved: bool = False


def read_activation(fn: Callable[[Tensor], Tensor], width: int) -> Activation | str:
    """The activation that ``fn`` computes on ``[T, width]``, or why it cannot be told."""
    try:
        with torch.no_grad():
            graph = _compat.trace_function(fn, torch.zeros(_ROWS, width))
    except Exception as error:  # whatever the module meets on a lone CPU tensor, the answer is a refusal
        return f"its activation could not be traced ({type(error).__name__}: {errors.first_line(error)})"
    try:
        found = _Reading(width).read(graph)
    except (vocabulary.Unsupported, errors.BadActivation, ArithmeticError, RecursionError) as error:
        return f"its activation is not in the pointwise language ({errors.first_line(error)})"
    return found if _agrees(fn, found, width) else f"its activation reads as {found.text!r} but computes something else"


class _Reading:
    """One walk over a traced function."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.columns: dict[Node, Any] = {}  # which columns of the input a node holds, as a tensor of column numbers
        self.exprs: dict[Node, Expr] = {}
        self.parts: set[str] = set()

    def read(self, graph: fx.Graph) -> Activation:
        for node in graph.nodes:
            if node.op == "placeholder":
                self.columns[node] = torch.arange(self.width).expand(_ROWS, self.width)
            elif node.op == "call_function":
                self._step(node)
            elif node.op == "output":
                return self._finish(node.args[0])
        raise vocabulary.Unsupported("nothing is returned")

    def _step(self, node: Node) -> None:
        if vocabulary.mutated(node):
            raise vocabulary.Unsupported(f"{vocabulary.spelled(node)} works in place")
        sources = node.all_input_nodes
        name = vocabulary.name_of(node)
        if sources and name in _MOVES and all(source in self.columns for source in sources):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.columns.__getitem__)
            self.columns[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif name in vocabulary.VIEWS | vocabulary.CASTS | {"_to_copy"} and _same_shape(node, sources[0]):
            self._carry(node, sources[0])
        else:
            self.exprs[node] = vocabulary.build(node, self._lift)

    def _carry(self, node: Node, source: Node) -> None:
        if source in self.columns:
            self.columns[node] = self.columns[source]
        else:
            self.exprs[node] = self.exprs[source]

    def _lift(self, item: Any) -> Any:
        if not isinstance(item, Node):
            return item
        if item in self.exprs:
            return self.exprs[item]
        if item in self.columns:
            return Var(self._variable(self.columns[item]))
        raise vocabulary.Unsupported(f"a tensor {item.name} takes part")

    def _variable(self, columns: Any) -> str:
        """``g`` or ``u`` for a tensor of column numbers; which cut it was goes to ``parts``."""
        if not isinstance(columns, Tensor) or columns.dim() != 2 or columns.shape[0] != _ROWS:
            raise vocabulary.Unsupported("a cut that is not along the features")
        every, half = torch.arange(self.width), self.width // 2
        cuts = {
            "whole g": every, "half g": every[:half], "half u": every[half:],
            "alternate g": every[::2], "alternate u": every[1::2],
        }  # fmt: skip
        for cut, expected in cuts.items():
            if columns.shape[1] == len(expected) and bool((columns == expected).all()):
                self.parts.add(cut)
                return cut[-1]
        raise vocabulary.Unsupported("a cut that is neither a half nor every second column")

    def _finish(self, result: Any) -> Activation:
        if not isinstance(result, Node):
            raise vocabulary.Unsupported("it does not return one tensor")
        expr = self._lift(result)
        kinds = {part.split()[0] for part in self.parts}
        if len(kinds) != 1 or (kinds != {"whole"} and len(self.parts) != 2):
            raise vocabulary.Unsupported(f"it reads {', '.join(sorted(self.parts)) or 'no columns'}")
        text = pointwise.canonical(pointwise.unparse(pointwise.fold(expr)))
        if isinstance(expr, Const) or pointwise.n_inputs(text) != len(self.parts):
            raise vocabulary.Unsupported(f"{text} does not use what it reads")
        return Activation(text, kinds == {"alternate"} and self.width > 2)


def _same_shape(node: Node, source: Node) -> bool:
    ours, theirs = (n.meta.get("val") for n in (node, source))
    return isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.shape == theirs.shape


@torch.enable_grad()
def _agrees(fn: Callable[[Tensor], Tensor], found: Activation, width: int) -> bool:
    """Values and gradients on random rows."""
    generator = torch.Generator().manual_seed(0)
    h = (_SPREAD * torch.randn(_ROWS, width, generator=generator)).requires_grad_()
    theirs, ours = fn(h), pointwise.apply(found.text, h, interleaved=found.interleaved)
    if theirs.shape != ours.shape:
        return False
    weight = torch.randn(ours.shape, generator=generator)
    theirs_grad, ours_grad = (torch.autograd.grad((y * weight).sum(), h)[0] for y in (theirs, ours))
    return _close(theirs, ours) and _close(theirs_grad, ours_grad)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE * b.abs().max().clamp(min=1e-6))
