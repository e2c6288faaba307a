"""Finding the feed-forward blocks of a live model: walk the modules from the leaves up, trace, recognise.

Contract
    in    a model on any device, the meta device included; nothing is computed and nothing changes
    out   ``Block``s in model order (what a block is made of and where it sits), ``SkippedSite``s with reasons
    A module is traced where parameters below it look like a pair of projections ([n*F, D] and [D, F], either way up) of
    which at least one was not seen in a trace yet.  What cannot be traced alone is left to its parent.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.fx import Node

from moepass.graph.names import ROOT, site_id, site_ids
from moepass.graph.site import DenseFFN, Projection
from moepass.nn.moe import MoE
from moepass.nn.origin import Part, Place
from moepass.upcycle.boundary import Boundary, boundary
from moepass.upcycle.modules import Location, Names, is_plain, subtree
from moepass.upcycle.report import SkippedSite
from moepass.upcycle.splice import spliced_name
from moepass.upcycle.trace import Memo, Traced, trace

#: A parameter by its place: the identity of the owning module and the attribute (tied parameters have several).
Key = tuple[int, str]
Size = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """What a trace says about a block, free of graph nodes and of names outside the traced module.

    Its ``Part``s are named relative to that module; ``rows`` and ``transposed`` as in ``site.Projection``.
    """

    ups: tuple[Part, ...]
    down: Part
    program: str
    dropout: float
    D: int
    F: int
    boundary: Boundary | None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter's name, each once."""
        return tuple(dict.fromkeys(name for part in (*self.ups, self.down) for name in part.names))


@dataclass(frozen=True)
class Block:
    """One feed-forward block of the model.

    ``module`` is the module that was traced, ``name`` its first name; it takes tokens of ``input_width``, or token ids
    where that is None.
    """

    id: str
    name: str
    module: nn.Module
    shape: Shape
    boundary: Boundary
    location: Location
    input_width: int | None

    @property
    def place(self) -> Place:
        """Where its MoE goes and which tensors it is made from, in names of the model."""
        where = self.location.moe[0]
        if self.location.splice is not None:
            where = _join(where, spliced_name(self.module))
        return Place(where, tuple(self._named(up) for up in self.shape.ups), self._named(self.shape.down))

    def _named(self, part: Part) -> Part:
        bias = None if part.bias is None else _join(self.name, part.bias)
        return replace(part, weight=_join(self.name, part.weight), bias=bias)


@dataclass(frozen=True)
class Miss:
    """A candidate that was rejected inside a trace; ``weight`` names its output projection's parameter."""

    weight: str | None
    code: str
    detail: str


@dataclass(frozen=True)
class Look:
    """What one trace showed.  ``seen``: parameters that took part; ``error`` where the trace failed."""

    shapes: tuple[Shape, ...] = ()
    misses: tuple[Miss, ...] = ()
    seen: frozenset[str] = frozenset()
    error: str | None = None


@dataclass
class Findings:
    """The result of a walk."""

    blocks: list[Block] = field(default_factory=list)
    skipped: list[SkippedSite] = field(default_factory=list)


def find(model: nn.Module) -> Findings:
    """All feed-forward blocks of a model, and the near misses.  See the module docstring."""
    walk = _Walk(model)
    walk.visit(model)
    blocks = sorted(walk.findings.blocks, key=lambda block: walk.names.order[block.location.moe[0]])
    ids = site_ids([[_join(block.name, p) for p in block.shape.parameters] for block in blocks])
    return Findings([replace(block, id=id) for block, id in zip(blocks, ids, strict=True)], walk.findings.skipped)


class _Walk:
    def __init__(self, model: nn.Module) -> None:
        self.names = Names(model)
        self.findings = Findings()
        self.memo: Memo[Look] = Memo(lambda look: not look.shapes)
        self.seen: set[Key] = set()  # parameters that a trace has covered: no second verdict on them
        self.claimed: set[Key] = set()  # parameters of recognised blocks: no partners for others
        self.failed: list[tuple[nn.Module, str, dict[Key, Size]]] = []
        self.visited: set[int] = set()

    def visit(self, module: nn.Module, top: bool = True) -> None:
        """Leaves first; every module object once."""
        if id(module) in self.visited:
            return
        self.visited.add(id(module))
        if isinstance(module, MoE):
            self._skip(self._name(module), "already_moe")
            return
        for child in module.children():
            self.visit(child, top=False)
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            self._look(module)
        if top:
            self._tell_failures()

    def _look(self, module: nn.Module) -> None:
        owned = {key: t for key, t in _matrices(module) if key not in self.claimed}
        fresh = {key: t for key, t in owned.items() if key not in self.seen}
        errors = []
        for D in _attempts(_sizes(owned.values()), _sizes(fresh.values())):
            look = self.memo.get(module, D, functools.partial(examine, module, D, next(iter(fresh.values()))))
            if look.error is None:
                self._accept(module, look, D)
                return
            errors.append(look.error)
        if errors:
            self.failed.append((module, errors[0], dict(zip(fresh, _sizes(fresh.values()), strict=True))))

    def _accept(self, module: nn.Module, look: Look, D: int | None) -> None:
        """Book what a trace showed; what an inner module's trace showed already stays as it was."""
        for shape in look.shapes:
            if _key(module, shape.down.weight) not in self.seen:
                self._place(module, shape, D)
        for miss in look.misses:
            if miss.weight is None or _key(module, miss.weight) not in self.seen:
                path = miss.weight.rpartition(".")[0] if miss.weight else ""
                self._skip(_join(self._name(module), path), miss.code, miss.detail)
        self.seen.update(_key(module, name) for name in look.seen)

    def _place(self, module: nn.Module, shape: Shape, D: int | None) -> None:
        self.claimed.update(_key(module, name) for name in shape.parameters)
        name = self._name(module)
        site = site_id([_join(name, p) for p in shape.parameters])
        for parameter in shape.parameters:
            code = is_plain(module.get_parameter(parameter))
            if code is not None:
                return self._skip(site, code, parameter)
        if shape.boundary is None:
            return self._skip(site, "no_module_boundary")
        location = locate(self.names, module, shape.boundary)
        if isinstance(location, str):
            return self._skip(site, location)
        self.findings.blocks.append(Block(site, name, module, shape, shape.boundary, location, D))
        return None

    def _skip(self, name: str, code: str, detail: str = "") -> None:
        self.findings.skipped.append(SkippedSite(name or ROOT, code, detail))

    def _name(self, module: nn.Module) -> str:
        return self.names.of_module[id(module)][0]

    def _tell_failures(self) -> None:
        """Failed traces that may hide a block, deepest module first.  Square pairs alone are left out: attention."""
        told = set(self.seen)
        for module, error, sizes in self.failed:
            left = [size for key, size in sizes.items() if key not in told and size[0] != size[1]]
            if model_widths(left, left):
                self._skip(self._name(module), "trace_failed", error)
            told |= set(sizes)


def _attempts(sizes: Sequence[Size], fresh: Sequence[Size]) -> list[int | None]:
    """Inputs to try: tokens of each width that fits, then token ids, unless only square pairs are left (attention)."""
    widths: list[int | None] = [*model_widths(sizes, fresh)]
    oblong = model_widths(sizes, [size for size in fresh if size[0] != size[1]])
    return [*widths, None] if oblong else widths


def examine(module: nn.Module, D: int | None, like: Tensor) -> Look:
    """Trace one module and recognise its blocks."""
    from moepass.graph.dense import recognise

    traced = trace(module, D, like)
    if isinstance(traced, str):
        return Look(error=traced)
    shapes: list[Shape] = []
    misses: list[Miss] = []
    for found in recognise(traced.gm, lambda node: node.name in traced.parameter_of):
        if not isinstance(found, DenseFFN):
            misses.append(Miss(_weight_of(traced, found.output), found.code, found.detail))
        elif (shape := _shape(module, traced, found)) is not None:
            shapes.append(shape)
    return Look(tuple(shapes), tuple(misses), frozenset(traced.parameter_of.values()))


def _shape(module: nn.Module, traced: Traced, site: DenseFFN) -> Shape | None:
    ups = [_part(traced, up) for up in site.ups]
    down = _part(traced, site.down)
    if down is None or any(up is None for up in ups):
        return None
    parts = tuple(up for up in ups if up is not None)
    place = boundary(module, traced, site, [p.weight for p in parts], down.weight)
    return Shape(parts, down, site.program, site.dropout, site.D, site.F, place)


def _part(traced: Traced, projection: Projection) -> Part | None:
    weight = traced.parameter(projection.weight)
    bias = None if projection.bias is None else traced.parameter(projection.bias)
    if weight is None or (projection.bias is not None and bias is None):
        return None
    return Part(weight, bias, projection.rows, projection.transposed)


def _weight_of(traced: Traced, output: Node) -> str | None:
    names = [traced.parameter(node) for node in output.all_input_nodes]
    return next((name for name in names if name is not None and name.rpartition(".")[2] != "bias"), None)


def locate(names: Names, module: nn.Module, place: Boundary) -> Location | str:
    """The boundary in names of the model; a reason code where something else holds on to the same modules."""
    aliases = names.of_module[id(module)]
    if not place.chain:
        if place.splice is not None:
            gone = (*place.splice.ups, place.splice.down)
            return Location(tuple(aliases), tuple(_join(aliases[0], name) for name in gone), place.splice)
        return "root_module" if "" in aliases else Location(tuple(aliases))
    links = [module.get_submodule(name) for name in place.chain]
    inside = subtree(module)
    for link in links:
        if sum(parent in inside for parent, _ in names.holders[id(link)]) != 1:
            return "no_module_boundary"
    for link in (links[0], links[-1]):
        if len(names.holders[id(link)]) != 1:
            return "tied_weight"
    first, *rest = place.chain
    here = aliases[0]
    return Location((_join(here, first),), tuple(_join(here, name) for name in rest))


def covered(block: Block) -> set[int]:
    """Identities of the modules that disappear when a block is converted."""
    place = block.boundary
    if place.chain:
        return {i for name in place.chain for i in subtree(block.module.get_submodule(name))}
    if place.splice is not None:
        return {id(block.module.get_submodule(name)) for name in (*place.splice.ups, place.splice.down)}
    return subtree(block.module)


def model_widths(sizes: Sequence[Size], fresh: Sequence[Size]) -> list[int]:
    """Widths D for which two matrices fit together as [n*F, D] and [D, F], or as [D, n*F] and [F, D]; narrowest first.

    At least one of the two must be ``fresh``.  Narrow first: most blocks widen, and a wrong width fails quickly.
    """
    known, new, widths = Counter(sizes), set(fresh), set[int]()
    for size in known:
        for D, F, flip in ((*size, False), (*size[::-1], True)):
            for n in (1, 2):
                other = (D, n * F) if flip else (n * F, D)
                distinct = known[other] > (other == size)
                if distinct and (size in new or other in new):
                    widths.add(D)
    return sorted(widths)


def _sizes(matrices: Iterable[Tensor]) -> list[Size]:
    return [(t.shape[0], t.shape[1]) for t in matrices]


def _matrices(module: nn.Module) -> Iterator[tuple[Key, Tensor]]:
    """Floating 2-D parameters below a module outside MoEs and embeddings, by (owner, attribute)."""
    if isinstance(module, MoE | nn.Embedding):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 2 and parameter.is_floating_point():
            yield (id(module), name), parameter
    for child in module.children():
        yield from _matrices(child)


def _key(module: nn.Module, parameter: str) -> Key:
    owner, _, name = parameter.rpartition(".")
    return id(module.get_submodule(owner)), name


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
