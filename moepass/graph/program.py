"""What stands between the input projections and the output projection, as a pointwise program or an obstacle.

``read`` walks back from the output projection's input to the projections it closes on, then builds the expression
forward.  The first node that is not a pointwise operation of the vocabulary, a harmless view or a dropout ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from moepass import errors, pointwise
from moepass.graph import shapes, values, vocabulary
from moepass.graph.dataflow import Dataflow
from moepass.graph.projection import Projections, Refusal, Slot
from moepass.graph.streams import Kind, Stream
from moepass.graph.vocabulary import CASTS, CUTS, DROPOUTS, MOVES, POINTWISE, VIEWS, name_of, spelled
from moepass.pointwise import Call, Const, Expr, Var

_MAX_NODES = 200  # a pointwise program longer than this is no activation


@dataclass(frozen=True)
class Program:
    """``slots`` in graph order stand behind the variables ``s0, s1, ...`` of ``expr`` until ``named`` gives them names.

    ``obstacle`` is set where the walk met something that cannot be in a program; ``expr`` is then meaningless.
    """

    slots: tuple[Slot, ...]
    nodes: tuple[Node, ...]  # graph order, projections and their cuts not included
    expr: Expr
    dropout: float
    obstacle: Refusal | None = None


def read(root: Node, flow: Dataflow, projections: Projections, streams: dict[Node, Stream]) -> Program:
    """The program whose result is ``root``."""
    slots, nodes = _collect(root, projections, streams)
    ordered = sorted(nodes, key=flow.position.__getitem__)
    parts = sorted(set(slots.values()), key=lambda slot: (flow.position[slot.affine.node], slot.start))
    names = {node: Var(f"s{parts.index(slot)}") for node, slot in slots.items()}
    empty = Program(tuple(parts), tuple(ordered), Const(0.0), 0.0)
    if len(ordered) > _MAX_NODES:
        return replace(empty, obstacle=("not_pointwise", f"more than {_MAX_NODES} operations between the projections"))
    return _evaluate(root, _Scope(dict(names), streams), empty)


def _collect(root: Node, projections: Projections, streams: dict[Node, Stream]) -> tuple[dict[Node, Slot], set[Node]]:
    slots: dict[Node, Slot] = {}
    nodes: set[Node] = set()
    stack = [root]
    while stack and len(nodes) <= _MAX_NODES:
        node = stack.pop()
        if node in slots or node in nodes:
            continue
        if (slot := projections.slot(node)) is not None:
            slots[node] = slot
            continue
        nodes.add(node)
        stack.extend(source for source in node.all_input_nodes if streams[source].kind is Kind.HIDDEN)
    return slots, nodes


@dataclass
class _Scope:
    exprs: dict[Node, Expr]
    streams: dict[Node, Stream]

    def lift(self, item: Any) -> Any:
        """An argument of a pointwise node as the builder wants it."""
        if isinstance(item, Node) and item in self.exprs:
            return self.exprs[item]
        if isinstance(item, Node) and values.tensor(item) is not None:
            raise _Foreign(item)
        return item if item is None or isinstance(item, (bool, str)) else values.number(item)


class _Foreign(Exception):
    """A tensor that is no part of the program."""


def _evaluate(root: Node, scope: _Scope, program: Program) -> Program:
    dropped: dict[Node, float] = {}
    for node in program.nodes:
        try:
            step = _step(node, scope, dropped)
        except vocabulary.Unsupported as error:
            return replace(program, obstacle=("unknown_activation", str(error)))
        except _Foreign as error:
            return replace(program, obstacle=("tensor_in_program", f"{spelled(node)} reads {error.args[0]}"))
        if step is not None:
            return replace(program, obstacle=step)
    if len(dropped) > 1 or any(not _only_moves_until(node, root) for node in dropped):
        return replace(program, obstacle=("not_pointwise", "dropout inside the activation"))
    return replace(program, expr=scope.exprs[root], dropout=next(iter(dropped.values()), 0.0))


def _step(node: Node, scope: _Scope, dropped: dict[Node, float]) -> Refusal | None:
    """Give ``node`` its expression, or say why it has none."""
    name, source = name_of(node), shapes.first(node)
    carried = scope.exprs.get(source) if source is not None else None
    if carried is not None and (shapes.same_features(node) or shapes.same_cast(node)):
        scope.exprs[node] = carried
        return None
    if carried is not None and name in DROPOUTS:
        probability, training = _dropout(node)
        if probability > 0 and training:
            dropped[node] = probability
        scope.exprs[node] = carried
        return None
    first_of_dropout = name == "getitem" and source is not None and name_of(source) in DROPOUTS and node.args[1] == 0
    if first_of_dropout and carried is not None:
        scope.exprs[node] = carried
        return None
    if name in CASTS:
        return "cast_in_program", f"{spelled(node)} changes the dtype or the device"
    if name in VIEWS | MOVES | CUTS:
        return "shape_not_understood", f"{spelled(node)} gives {_sizes(node)}"
    if name not in POINTWISE:
        return _not_in_vocabulary(node)
    return _pointwise(node, scope)


def _pointwise(node: Node, scope: _Scope) -> Refusal | None:
    scope.exprs[node] = vocabulary.build(node, scope.lift)
    after = values.tensor(node)
    if after is None:
        return "shape_not_understood", f"{node.name} carries no example value"
    for source in node.all_input_nodes:
        before = values.tensor(source)
        if source not in scope.exprs or before is None:
            continue
        if before.dtype != after.dtype:
            return "cast_in_program", f"{spelled(node)} turns {before.dtype} into {after.dtype}"
        if not values.same_sizes(before, after):
            return "shape_not_understood", f"{spelled(node)} broadcasts {source.name} to {_sizes(node)}"
    return None


def _not_in_vocabulary(node: Node) -> Refusal:
    if vocabulary.is_torch_pointwise(node) is False:
        return "not_pointwise", f"{spelled(node)} is not pointwise"
    return "unknown_activation", f"{spelled(node)} is not in the vocabulary"


def _dropout(node: Node) -> tuple[float, bool]:
    """(p, training); a functional dropout drops unless told otherwise."""
    probability = values.number(vocabulary.argument(node, 1, "p", default=0.5))
    training = vocabulary.argument(node, 2, "training", "train", default=True)
    if not isinstance(training, bool) and training is not None:
        raise vocabulary.Unsupported("dropout whose training flag is not known at compile time")
    return probability, training is not False


def _only_moves_until(node: Node, root: Node) -> bool:
    """Whether nothing but views stands between a dropout and the result."""
    while node is not root:
        users = [user for user in node.users if name_of(user) in VIEWS | CASTS | DROPOUTS | {"getitem"}]
        if len(users) != 1:
            return False
        node = users[0]
    return True


def _sizes(node: Node) -> str:
    held = values.tensor(node)
    return "an unknown shape" if held is None else str(tuple(held.shape))


# --- naming the variables --------------------------------------------------------------------------------------------

_PIECEWISE_LINEAR = frozenset({"clamp", "clamp_max", "clamp_min"})
_LINEAR = frozenset({"add", "mul"})


def named(program: Program) -> tuple[tuple[Slot, ...], str]:
    """Slots in the order (g, u) and the canonical text.  The gate is the projection under the nonlinearity.

    Raises ``errors.BadActivation`` where the language does not cover the expression.
    """
    slots = program.slots
    if len(slots) == 2 and gate(program.expr) == "s1":
        slots = slots[::-1]
    names = {f"s{program.slots.index(slot)}": name for slot, name in zip(slots, pointwise.VARIABLES, strict=False)}
    try:
        folded = pointwise.fold(pointwise.rename(program.expr, names))
        return slots, pointwise.canonical(pointwise.unparse(folded))
    except (ArithmeticError, RecursionError) as error:
        raise errors.BadActivation(text="", detail=str(error), known=pointwise.known_names()) from None


def gate(expr: Expr, names: Sequence[str] = ("s0",)) -> str:
    """The one variable that stands under a nonlinearity; clamps count only if that does not decide; else the first."""
    for ignored in (_LINEAR | _PIECEWISE_LINEAR, _LINEAR):
        bent = _bent(expr, lambda op, ignored=ignored: op not in ignored, False)  # type: ignore[misc]
        if len(bent) == 1:
            return next(iter(bent))
    return names[0]


def _bent(expr: Expr, bends: Callable[[str], bool], under: bool) -> set[str]:
    match expr:
        case Var(name):
            return {name} if under else set()
        case Call("div", (x, Const())):
            return _bent(x, bends, under)
        case Call(op, args):
            return set().union(*(_bent(arg, bends, under or bends(op)) for arg in args))
    return set()
