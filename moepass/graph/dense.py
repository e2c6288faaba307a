"""Recognising dense feed-forward blocks: input projections of one tensor -> pointwise program -> output projection.

``find``       every output projection whose input closes, row by row, on at least one projection
``decide``     one candidate -> ``DenseFFN``, ``Rejected`` with a code of ``site.REASONS``, or None for plain chance
``recognise``  one graph;  ``recognise_all`` a graph and the bodies of its higher-order ops
Nothing is changed.  The decision reads dataflow only: no module class, no name, no fixed spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch.fx import GraphModule, Node

from moepass import errors, pointwise
from moepass.graph import capture, shapes, values
from moepass.graph.dataflow import Dataflow
from moepass.graph.program import Program, named, read
from moepass.graph.projection import Affine, Projections, Refusal, Slot, refuse_weight
from moepass.graph.site import DenseFFN, Rejected
from moepass.graph.streams import Kind, Stream, classify

IsParameter = Callable[[Node], bool]
Found = DenseFFN | Rejected


@dataclass(frozen=True)
class View:
    """A graph as the recogniser reads it."""

    flow: Dataflow

    @cached_property
    def projections(self) -> Projections:
        """All affine maps."""
        return Projections(self.flow)

    @cached_property
    def streams(self) -> dict[Node, Stream]:
        """What every tensor is to a feed-forward block."""
        return classify(self.flow, self.projections)


@dataclass(frozen=True)
class Candidate:
    """An output projection and what its input closes on."""

    down: Affine
    program: Program

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The input projections, graph order."""
        return self.program.slots

    @cached_property
    def interior(self) -> tuple[Node, ...]:
        """Every node from the input projections to the output projection."""
        nodes = {*self.program.nodes, *self.down.nodes}
        for slot in self.slots:
            nodes.update(slot.affine.nodes)
        return tuple(nodes)


def recognise(gm: GraphModule, is_parameter: IsParameter | None = None) -> list[Found]:
    """Sites and near misses of one graph, graph order, none overlapping.

    ``is_parameter``  tells whether a placeholder holds an ``nn.Parameter``; by default the node's metadata do.
    """
    view = View(Dataflow(gm.graph, is_parameter))
    found: list[Found] = []
    taken: set[Node] = set()
    for candidate in find(view):
        verdict = decide(candidate, view)
        if isinstance(verdict, DenseFFN):
            used = {p.node for p in (*verdict.ups, verdict.down)}
            if used & taken:
                verdict = Rejected(candidate.down.node, "overlaps", "a projection belongs to the block before")
            else:
                taken |= used
        if verdict is not None:
            found.append(verdict)
    return found


def recognise_all(gm: GraphModule, is_parameter: IsParameter | None = None) -> list[tuple[capture.Path, Found]]:
    """``recognise`` for a graph and, by path of sub-module names, every sub-graph (checkpoint bodies and the like)."""
    every: list[tuple[capture.Path, Found]] = [((), verdict) for verdict in recognise(gm, is_parameter)]
    for name, child in gm.named_children():
        if isinstance(child, GraphModule):
            inner = is_parameter or _through_calls(gm, name, child)
            every.extend(((name, *path), verdict) for path, verdict in recognise_all(child, inner))
    return every


def _through_calls(gm: GraphModule, name: str, child: GraphModule) -> IsParameter:
    """Whether a body's placeholder is a parameter: by its own metadata, or because every call passes one."""
    inputs = capture.placeholders(child.graph)
    passed = [capture.operands(call, child) for call in capture.calls(gm, name) if len(call.args) >= len(inputs)]
    holds = Dataflow(gm.graph).holds_parameter

    def decide_by_call(node: Node) -> bool:
        if values.is_parameter(node):
            return True
        position = inputs.index(node)
        given = [args[position] for args in passed]
        return bool(given) and all(isinstance(item, Node) and holds(item) for item in given)

    return decide_by_call


# --- find ------------------------------------------------------------------------------------------------------------


def find(view: View) -> Iterator[Candidate]:
    """Every output projection whose input is a hidden tensor, graph order."""
    for down in view.projections:
        if view.streams[down.x].kind is not Kind.HIDDEN:
            continue
        program = read(down.x, view.flow, view.projections, view.streams)
        if program.slots:
            yield Candidate(down, program)


# --- decide ----------------------------------------------------------------------------------------------------------


def decide(candidate: Candidate, view: View) -> Found | None:
    """The verdict on one candidate.

    A hidden tensor that escapes makes a near miss only where everything else fits: two projections that merely follow
    one another in a larger computation are nobody's business.
    """
    flow, down = view.flow, candidate.down
    escape = _escape(candidate, flow)
    if (refusal := _mutated(candidate, flow)) is not None:
        return Rejected(down.node, *refusal)
    if (refusal := _widths(candidate) or candidate.program.obstacle or _structure(candidate)) is not None:
        return None if escape else Rejected(down.node, *refusal)
    if escape is not None:
        return Rejected(down.node, *escape)
    return _assemble(candidate, flow)


def _escape(candidate: Candidate, flow: Dataflow) -> Refusal | None:
    for slot in candidate.slots:
        node = slot.affine.node
        if not flow.post_dominates(candidate.down.node, node):
            return "hidden_escapes", f"{node.name} reaches more than {candidate.down.node.name}"
    return None


def _structure(candidate: Candidate) -> Refusal | None:
    """Whether inputs, widths and program make a feed-forward block."""
    slots, down = candidate.slots, candidate.down
    if (refusal := _linear(candidate)) is not None:
        return refusal
    inputs = {shapes.strip(slot.affine.x) for slot in slots}
    if len(inputs) > 1:
        return "inputs_differ", ", ".join(sorted(node.name for node in inputs))
    if len(slots) > 2:
        return "too_many_projections", f"{len(slots)} projections"
    if slots[0].width != down.in_features:
        return "shape_not_understood", f"width {slots[0].width} goes in, the output projection reads {down.in_features}"
    if slots[0].affine.in_features != down.out_features:
        return "width_changes", f"{slots[0].affine.in_features} -> {slots[0].width} -> {down.out_features}"
    return None


def _widths(candidate: Candidate) -> Refusal | None:
    widths = {slot.width for slot in candidate.slots}
    return ("widths_differ", " and ".join(map(str, sorted(widths)))) if len(widths) > 1 else None


def _linear(candidate: Candidate) -> Refusal | None:
    try:
        if pointwise.degree(pointwise.fold(candidate.program.expr)) > 1:
            return None
    except ArithmeticError:  # a constant is not finite: ``named`` says so
        return None
    return "no_nonlinearity", "the program is linear in the projections"


def _mutated(candidate: Candidate, flow: Dataflow) -> Refusal | None:
    """In-place changes that the rewritten block would not see, or would see too late."""
    inside, down = set(candidate.interior), candidate.down
    for node in candidate.interior:
        if node in down.nodes:
            continue
        for mutator in flow.mutators(node):
            if mutator not in inside or flow.stale_use(mutator) is not None:
                return "mutated", f"{mutator.name} changes {flow.base(node).name} in place"
    start = min(flow.position[slot.affine.node] for slot in candidate.slots)
    end = flow.position[down.node]
    weights = [w for a in (down, *(s.affine for s in candidate.slots)) for w in (a.weight, a.bias) if w is not None]
    for node, since in [(shapes.strip(slot.affine.x), start) for slot in candidate.slots] + [(w, -1) for w in weights]:
        for mutator in flow.mutators(node):
            if since < flow.position[mutator] < end and mutator not in inside:
                return "mutated", f"{mutator.name} changes {node.name} in place"
    return None


def _assemble(candidate: Candidate, flow: Dataflow) -> Found:
    """Everything about the region fits; the weights, the mode and the text of the program remain."""
    down = candidate.down
    if (refusal := _environment(candidate, flow)) is not None:
        return Rejected(down.node, *refusal)
    try:
        slots, text = named(candidate.program)
    except errors.BadActivation as error:
        return Rejected(down.node, "unknown_activation", str(error))
    if not pointwise.is_nonlinear(text) or pointwise.n_inputs(text) != len(slots):
        return Rejected(down.node, "no_nonlinearity", f"the program {text} does not bend all its projections")
    x = _common_input(candidate)
    if x is None:
        return Rejected(down.node, "shape_not_understood", "the block returns other leading dimensions than it reads")
    return DenseFFN(
        x=x,
        ups=tuple(slot.projection() for slot in slots),
        program=text,
        dropout=candidate.program.dropout,
        down=Slot(down, 0, down.out_features).projection(),
        output=down.node,
        D=down.out_features,
        F=down.in_features,
        interior=_region(candidate, x, flow),
    )


def _environment(candidate: Candidate, flow: Dataflow) -> Refusal | None:
    slots, down = candidate.slots, candidate.down
    if not flow.one_mode(candidate.interior):
        return "crosses_autocast", "the projections run in different autocast or grad-mode regions"
    for affine in (*(slot.affine for slot in slots), down):
        for node in (affine.weight, affine.bias):
            if node is not None and (refusal := refuse_weight(flow, node)) is not None:
                return refusal
    held = values.tensor(slots[0].affine.x)
    if held is not None and not held.dtype.is_floating_point:
        return "non_floating", f"the input is {held.dtype}"
    if len({slot.affine.bias is None for slot in slots}) > 1:
        return "mixed_biases", "one of gate and up has a bias, the other has none"
    return None


def _common_input(candidate: Candidate) -> Node | None:
    """The tensor that all projections read, stripped of views as far as the output's shape allows.

    The output has the leading dimensions of the result, or is flat ([T, D]).
    """
    output = values.tensor(candidate.down.node)
    direct = {slot.affine.x for slot in candidate.slots}
    stripped = shapes.strip(candidate.slots[0].affine.x)
    for x in (stripped, *sorted(direct, key=str)):
        held = values.tensor(x)
        if output is None or held is None:
            continue
        if output.dim() == 2 or values.same_sizes(held, output, leading=True):
            return x
    return None


def _region(candidate: Candidate, x: Node, flow: Dataflow) -> tuple[Node, ...]:
    """The interior, plus cuts and views of the region that nothing outside it reads; graph order."""
    inside = set(candidate.interior)
    frontier = [*inside]
    while frontier:
        node = frontier.pop()
        for source in node.all_input_nodes:
            if source is x or source in inside or source.op in ("placeholder", "get_attr"):
                continue
            if all(user in inside for user in source.users) and (flow.feeds(x, source) or source in flow.constants):
                inside.add(source)
                frontier.append(source)
    return tuple(sorted(inside, key=flow.position.__getitem__))
