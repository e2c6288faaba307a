"""From a completed walk to the site: what the experts read, and the last checks.

``ForeignExperts``  ``output = base? + sum_k weight[t,k] * expert_{index[t,k]}(steps(x_t))``, all nodes of one graph
``assemble``        an ending -> ``ForeignExperts``, or a refusal
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from moepass import errors, pointwise
from moepass.graph import program, values, vocabulary
from moepass.graph.dataflow import Dataflow
from moepass.graph.foreign.facts import (
    Copies,
    Ending,
    EveryRow,
    Gemm,
    Hidden,
    Outcome,
    PairValue,
    Part,
    Rows,
    Size,
    Sparse,
    Step,
)
from moepass.graph.foreign.walk import known_equal, shape
from moepass.graph.projection import Refusal, refuse_kind
from moepass.pointwise import Expr

_FAR = 40  # nodes between a weight's use and its parameter


@dataclass(frozen=True)
class ForeignExperts:
    """An existing expert computation.  ``ups`` are in the order of the program's variables: g, then u."""

    x: Node  # [..., D]
    steps: tuple[Step, ...]  # casts and weights on the rows before the input projections
    index: Node  # [..., K] expert ids
    weight: PairValue | Sparse | None  # None: the rows are summed as they are
    K: int
    ups: tuple[Gemm, ...]  # one or two: a stack of gate and up rows, or one stack each
    down: Gemm
    activation: str
    interleaved: bool
    dropout: float
    base: Node | None  # what the result is added onto
    output: Node
    every: Sparse | None = None  # the form that runs every expert on every token, weights on the input
    interior: tuple[Node, ...] = field(default=(), repr=False)

    @property
    def gemms(self) -> frozenset[Node]:
        """The projections."""
        return frozenset({self.down.node, *(gemm.node for gemm in self.ups)})

    @property
    def weight_on_input(self) -> bool:
        """Whether the rows are weighted before the experts, so that each choice of a token is a row of its own."""
        return (self.every is not None and self.weight is None) or any(step.weight for step in self.steps)

    @property
    def sources(self) -> tuple[Node, ...]:
        """Nodes that the replacement reads."""
        stacks = [n for g in (*self.ups, self.down) for n in (g.stack.node, g.bias) if n is not None]
        factors = [self.weight, *(step.weight for step in self.steps)]
        read = [f.source if isinstance(f, PairValue) else f.scores for f in factors if f is not None]
        extra = [n for n in (self.base, None if self.every is None else self.every.scores) if n is not None]
        return (self.x, self.index, *stacks, *read, *extra)


def holders(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """The inputs of two or more dimensions nearest behind each node: where its weights come from."""
    found: list[Node] = []
    for node in nodes:
        frontier, seen = [node], set[Node]()
        while frontier and len(seen) < _FAR:
            seen.update(frontier)
            held = [n for n in frontier if n.op in ("placeholder", "get_attr") and len(shape(n)) > 1]
            if held:
                found.extend(held)
                break
            frontier = list(dict.fromkeys(s for n in frontier for s in n.all_input_nodes if s not in seen))
    return tuple(dict.fromkeys(found))


def assemble(output: Node, ending: Ending, flow: Dataflow) -> ForeignExperts | Refusal:
    """The site that ends in ``output``."""
    outcome, down = ending.outcome, ending.outcome.gemm
    hidden = down.rows
    if not isinstance(hidden, Hidden):
        return "moe_form", "one projection alone is no feed-forward block"
    layout = _layout(hidden)
    if isinstance(layout[0], str):
        return layout
    ups, names, interleaved = layout
    if (refusal := _stacks(ups, down, hidden)) is not None:
        return refusal
    text = _text(hidden.expr, names)
    if isinstance(text, tuple):
        return text
    read = _inputs(ups, ending, output)
    if isinstance(read[0], str):
        return read
    x, steps, index, weight, K, every = read
    if (refusal := _silent(text, every, outcome, ups, down)) is not None:
        return refusal
    site = ForeignExperts(
        x, steps, index, weight, K, ups, down, text, interleaved, hidden.dropout, ending.base, output, every
    )
    return _settled(site, flow)


# --- projections and program -----------------------------------------------------------------------------------------


def _layout(hidden: Hidden) -> tuple[tuple[Gemm, ...], dict[str, str], bool] | Refusal:
    """The input projections, the variable of each part, and whether gate and up rows alternate."""
    parts = dict(hidden.parts)
    distinct = list(dict.fromkeys(part.gemm for part in parts.values()))
    if len(distinct) == 1 and len(parts) == 1 and next(iter(parts.values())).whole:
        return (distinct[0],), dict.fromkeys(parts, "g"), False
    if len(distinct) == 1 and len(parts) == 2:
        return _halves(distinct[0], parts)
    if len(distinct) == 2 and len(parts) == 2 and all(part.whole for part in parts.values()):
        names = sorted(parts, key=lambda name: name != program.gate(hidden.expr, sorted(parts)))
        return tuple(parts[name].gemm for name in names), dict(zip(names, ("g", "u"), strict=True)), False
    return "moe_form", f"the program reads {len(parts)} parts of {len(distinct)} projections"


def _halves(gemm: Gemm, parts: dict[str, Part]) -> tuple[tuple[Gemm, ...], dict[str, str], bool] | Refusal:
    width = gemm.stack.fan_out
    cuts = {(p.start, len(range(p.start, p.stop, p.step)), p.step): name for name, p in parts.items()}
    for first, second, interleaved in (
        ((0, width // 2, 1), (width // 2, width // 2, 1), False),
        ((0, width // 2, 2), (1, width // 2, 2), True),
    ):
        if width % 2 == 0 and set(cuts) == {first, second}:
            return (gemm,), {cuts[first]: "g", cuts[second]: "u"}, interleaved
    return "moe_form", f"the program reads features {sorted(cuts)} of {width}"


def _stacks(ups: tuple[Gemm, ...], down: Gemm, hidden: Hidden) -> Refusal | None:
    gemms = (*ups, down)
    if len({gemm.stack.experts for gemm in gemms}) > 1 or len({gemm.key for gemm in gemms}) > 1:
        return "inputs_differ", "the projections have different experts"
    if len({(g.stack.fan_in, g.stack.fan_out) for g in ups}) > 1 or len({g.bias is None for g in ups}) > 1:
        return "widths_differ", "gate and up differ in shape or bias"
    if down.stack.fan_out != ups[0].stack.fan_in:
        return "width_changes", f"{ups[0].stack.fan_in} -> {down.stack.fan_out}"
    if any(g.rows != ups[0].rows for g in ups):
        return "inputs_differ", "gate and up read different rows"
    if hidden.weight is not None and down.bias is not None:
        return "moe_combine", "the weight on the hidden rows is not on the output bias"
    for node in (n for g in gemms for n in (g.stack.node, g.bias) if n is not None):
        held = values.holder(node) if node.op in ("placeholder", "get_attr") else values.tensor(node)
        if held is not None and (refusal := refuse_kind(node, held)) is not None:
            return refusal
    return None


def _text(expr: Expr, names: dict[str, str]) -> str | Refusal:
    try:
        text = pointwise.canonical(pointwise.unparse(pointwise.fold(pointwise.rename(expr, names))))
    except (ArithmeticError, RecursionError, errors.BadActivation) as error:
        return "unknown_activation", str(error)
    if not pointwise.is_nonlinear(text) or pointwise.variables(pointwise.parse(text)) != set(names.values()):
        return "no_nonlinearity", f"the program {text} does not bend all its projections"
    return text


def _silent(text: str, every: Sparse | None, outcome: Outcome, ups: tuple[Gemm, ...], down: Gemm) -> Refusal | None:
    """Where the weights are on the input of every expert, an expert must give zero for zero."""
    if every is None or outcome.weight is not None:
        return None
    if down.bias is not None or any(g.bias is not None for g in ups) or not _zero_at_zero(text):
        return "moe_form", "an expert that gets zeros gives something else, so every expert counts"
    return None


def _zero_at_zero(text: str) -> bool:
    zero = torch.zeros((), dtype=torch.float64)
    return bool(pointwise.evaluate(pointwise.parse(text), {"g": zero, "u": zero}) == 0)


# --- inputs ----------------------------------------------------------------------------------------------------------

_Read = tuple[Node, tuple[Step, ...], Node, "PairValue | Sparse | None", int, "Sparse | None"]


def _inputs(ups: tuple[Gemm, ...], ending: Ending, output: Node) -> _Read | Refusal:
    rows = ups[0].rows
    if isinstance(rows, Rows):
        return _routed(rows, ups[0], ending, output)
    if isinstance(rows, (EveryRow, Copies)):
        return _masked(rows, ending.outcome)
    return "moe_form", "the input projections read no rows of tokens"


def _routed(rows: Rows, gemm: Gemm, ending: Ending, output: Node) -> _Read | Refusal:
    x, index, outcome = rows.x, gemm.key, ending.outcome
    K = rows.K
    if index is None or not _same(K, ending.K):
        return "moe_form", f"{rows.K} choices a token are read and {ending.K} are summed"
    tokens, pairs = math.prod(shape(x)[:-1]), math.prod(shape(index))
    if not known_equal(tokens * K, pairs) or (len(shape(index)) > 1 and not known_equal(shape(index)[-1], K)):
        return "moe_form", f"{shape(index)} expert ids for {tokens} tokens of {K} choices"
    if not known_equal(math.prod(shape(output)[:-1]), tokens):
        return "moe_form", f"{output.name} holds {shape(output)} for {tokens} tokens"
    on_input = any(step.weight is not None for step in rows.steps)
    if on_input and outcome.weight is not None:
        return "moe_combine", "the rows are weighted before and after the experts"
    return x, rows.steps, index, outcome.weight, K, None


def _masked(rows: EveryRow | Copies, outcome: Outcome) -> _Read | Refusal:
    if isinstance(rows, EveryRow) == (outcome.weight is not None):
        return "moe_form", "every expert counts for every token, with a weight on both sides or on none"
    scores = rows.scores if isinstance(rows, EveryRow) else outcome.weight
    assert isinstance(scores, Sparse)
    K = values.static(shape(scores.index)[-1])
    if K is None or not known_equal(math.prod(shape(rows.x)[:-1]), shape(scores.index)[0]):
        return "moe_form", f"{shape(scores.index)} expert ids"
    steps = tuple(Step(dtype=dtype) for dtype in rows.steps) if isinstance(rows, EveryRow) else ()
    return rows.x, steps, scores.index, outcome.weight, K, scores


def _same(K: int, other: Size | None) -> bool:
    return other is not None and known_equal(K, other)


# --- the region ------------------------------------------------------------------------------------------------------


def _settled(site: ForeignExperts, flow: Dataflow) -> ForeignExperts | Refusal:
    """Add the interior; refuse what an in-place change or a border of modes would make wrong, and what escapes."""
    interior = _interior(site, flow)
    inside = set(interior)
    end = flow.position[site.output]
    for source in site.sources:
        start = min((flow.position[user] for user in source.users if user in inside), default=end)
        for mutator in flow.mutators(source):
            if start < flow.position[mutator] < end:
                return "mutated", f"{mutator.name} changes {source.name} in place"
    for changed in vocabulary.mutated(site.output):
        late = [a for a in flow.aliases(changed) if a not in (changed, site.output) and _read_after(a, end, flow)]
        if late:
            return "mutated", f"{late[0].name} shows the result of {site.output.name} under another name"
    floating = [n for n in interior if (held := values.tensor(n)) is not None and held.is_floating_point()]
    if not flow.one_mode(n for n in floating if len(shape(n)) > 1):  # histograms may be taken under no_grad
        return "crosses_autocast", "the projections run in different autocast or grad-mode regions"
    alive = living(site, interior, flow)
    escaped = [gemm for gemm in site.gemms if gemm in alive]
    if escaped:
        return "hidden_escapes", f"{escaped[0].name} is also read outside the experts"
    return replace(site, interior=interior)


def _read_after(node: Node, position: int, flow: Dataflow) -> bool:
    return any(flow.position[user] > position for user in node.users)


def _interior(site: ForeignExperts, flow: Dataflow) -> tuple[Node, ...]:
    """Everything between what the site reads and its output, with the in-place changes made on the way."""
    stop, end = set(site.sources) - {site.output}, flow.position[site.output]
    inside, frontier = {site.output}, [site.output]
    while frontier:
        node = frontier.pop()
        changes = [m for m in flow.mutators(node) if node in vocabulary.mutated(m) and flow.position[m] <= end]
        for source in (*node.all_input_nodes, *changes):
            if source not in inside and source not in stop and source.op not in ("placeholder", "get_attr"):
                inside.add(source)
                frontier.append(source)
    return tuple(sorted(inside, key=flow.position.__getitem__))


def living(site: ForeignExperts, interior: tuple[Node, ...], flow: Dataflow) -> set[Node]:
    """Nodes of the interior that something besides the site needs."""
    inside, output = set(interior), site.output
    results = {output, *vocabulary.mutated(output)}
    end = flow.position[output]
    alive: set[Node] = set()
    changed = True
    while changed:
        changed = False
        for node in reversed(interior):
            users = [u for u in node.users if not (node in results and flow.position[u] > end)]
            needed = any(u not in inside or u in alive for u in users)
            changed_names = [a for t in vocabulary.mutated(node) if node is not output for a in flow.aliases(t)]
            needed = needed or any(a in alive or (a not in inside and a.users) for a in changed_names)
            if needed and node is not output and node not in alive:
                alive.add(node)
                changed = True
    return alive
