"""Site x workload x hardware -> decision: pure values, before anything in a graph or a model changes.

``Planned``  a site with its plan, ready to be rewritten and lowered
``Left``     a site that stays as it is, with a stable reason code
Comparing a symbolic T here is what installs the guards that make a plan valid (reference/compiler.md, finding 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moepass import _compat, errors, pointwise, workloads
from moepass.attach import DenseTensors, Layout, Recipe
from moepass.explain.report import Kind, PlanReport, SitePlan
from moepass.graph.capture import Capture, Path
from moepass.graph.foreign.site import ForeignExperts, holders
from moepass.graph.names import parameter_fqn, site_id, site_ids
from moepass.graph.semantic import SemanticExperts
from moepass.graph.site import EXPERT_REASONS, REASONS, DenseFFN, Projection, Rejected
from moepass.lowering.hardware import Hardware, remember
from moepass.lowering.measure import measure, shortlist
from moepass.lowering.plan import Plan, TokenRange, Workload
from moepass.lowering.planner import plan as plan_one
from moepass.lowering.planner import ranges, served_by
from moepass.lowering.registry import lowerings
from moepass.options import Options, pin_text
from moepass.spec import MoESpec, check_one_line
from moepass.upcycle.exactness import exactness
from moepass.upcycle.init import complete
from moepass.workloads import Size

#: Reason codes of this stage, beside ``graph.site.REASONS`` and the codes of ``errors``.
HINTS = {
    "conversion_off": "options['convert'] is False; leave it out to convert dense FFNs",
    "data_parallel": "DDP reduces only the parameters it was given; use moepass.convert before wrapping the model",
    "fake_inputs": "the graph came with fake weights (DDP buckets); use moepass.convert before wrapping the model",
    "internal_error": "report it with the output of TORCH_LOGS='+moepass'",
    "moe_model": "the model has experts already; options={'convert': True} converts its dense blocks as well",
    "plan_mismatch": "dump the plan anew with moepass.explain or MOEPASS_DUMP",
    "weight_copy": "gate and up are separate parameters, and joining them costs more than it gains at this T",
}

#: Skips that ``strict=True`` turns into errors: a feed-forward block that was meant to be converted and could not be.
STRICT_CODES = frozenset(
    {
        "cast_in_program", "data_parallel", "fake_inputs", "mixed_biases", "non_floating", "not_in_one_line",
        "quantised_weight", "sharded_parameter", "sparse_weight", "tensor_subclass", "unknown_activation",
        "weight_not_parameter",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A site to be lowered.

    ``dense`` and ``recipe`` are set for dense FFNs, ``semantic`` for existing nodes of our op, ``foreign`` for experts
    that other code spelled out.
    """

    id: str
    plan: Plan
    guard: str | None
    activation: str
    path: Path
    dense: DenseFFN | None = None
    recipe: Recipe | None = None
    semantic: SemanticExperts | None = None
    foreign: ForeignExperts | None = None

    def report(self) -> SitePlan:
        """The line in the plan report."""
        init = None
        if self.recipe is not None:
            verdict = exactness(self.recipe.spec, self.recipe.init)
            init = f"{self.recipe.init.method}, {'exact' if verdict.exact else 'not exact: ' + verdict.reason}"
        kind: Kind = "moe" if self.dense is None else "dense_ffn"
        hint = None
        if self.foreign is not None and len(self.foreign.ups) > 1:
            size = f"{_joined_bytes(self.plan.workload) / 2**20:.1f} MiB"
            hint = f"gate and up are joined by a copy of {size} at every call"
        return SitePlan.from_plan(
            self.id, kind, self.plan, activation=self.activation, init=init, guard=self.guard, hint=hint
        )


@dataclass(frozen=True)
class Left:
    """A site that stays as it is."""

    id: str
    kind: Kind
    code: str
    detail: str
    status: Literal["skipped", "fallback"] = "skipped"

    def report(self) -> SitePlan:
        """The line in the plan report."""
        hint = HINTS.get(self.code) or REASONS.get(self.code) or EXPERT_REASONS.get(self.code)
        return SitePlan(id=self.id, kind=self.kind, status=self.status, reason=self.code, detail=self.detail, hint=hint)


@dataclass(frozen=True)
class Situation:
    """What all sites of one compile share."""

    capture: Capture
    options: Options
    hardware: Hardware
    pinned: PlanReport | None
    train: bool
    tokens: int | None = None  # plan for this T instead of the example's
    has_experts: bool = False  # the graph has MoE blocks of its own
    routing: str = "random"  # what prices assume


def decide_dense(site: DenseFFN | Rejected, path: Path, name: str, where: Situation) -> Planned | Left:
    """What becomes of one dense candidate of the given name (``dense_ids``)."""
    if isinstance(site, Rejected):
        return Left(name, "dense_ffn", site.code, site.detail)
    init = where.options.init
    if init is None:
        return Left(name, "dense_ffn", "conversion_off", f"{pointwise.display_name(site.program)} F={site.F}")
    if where.has_experts and where.options.convert == "auto":
        return Left(name, "dense_ffn", "moe_model", f"{pointwise.display_name(site.program)} F={site.F}")
    if not where.capture.chains(path):
        return Left(name, "dense_ffn", "shape_not_understood", "the sub-graph is never called")
    try:
        asked = where.options.spec or MoESpec()
        check_one_line(asked, name)
        spec = complete(
            asked,
            F=site.F,
            D=site.D,
            program=site.program,
            init=init,
            bias_in=site.ups[0].bias is not None,
            bias_out=site.down.bias is not None,
            where=name,
        )
        recipe = Recipe(name, asked, spec, init, site.D, tuple(map(_layout, site.ups)), _layout(site.down))
        work, size = workloads.dense(site, spec, train=where.train)
        chosen, guard = select(name, work, size, where)
    except errors.MoepassError as error:
        if where.options.strict:
            raise
        mismatch = error.code == "plan_mismatch"
        return Left(name, "dense_ffn", error.code, str(error), "fallback" if mismatch else "skipped")
    return Planned(name, chosen, guard, site.program, path, dense=site, recipe=recipe)


def decide_semantic(site: SemanticExperts, index: int, where: Situation) -> Planned | Left:
    """What becomes of one existing ``moepass::experts`` node."""
    names = _fqns([site.operands["w_in"], site.operands["w_out"]], site.path, where.capture)
    name = site_id(names) if names else f"moe_{index}"
    if any(isinstance(site.operands[scalar], torch.fx.Node) for scalar in ("dropout", "capacity_factor")):
        return Left(name, "moe", "symbolic_scalar", "a float argument is symbolic; Dynamo will trace again", "fallback")
    found = _plan_existing(name, lambda: workloads.semantic(site, train=where.train), where)
    if isinstance(found, Left):
        return found
    chosen, guard = found
    return Planned(name, chosen, guard, site.operands["activation"], site.path, semantic=site)


def decide_foreign(site: ForeignExperts | Rejected, path: Path, name: str, where: Situation) -> Planned | Left:
    """What becomes of one existing expert computation of the given name (``foreign_ids``)."""
    if isinstance(site, Rejected):
        return Left(name, "moe", site.code, site.detail)
    found = _plan_existing(name, lambda: workloads.foreign(site, train=where.train), where)
    if isinstance(found, Left):
        return found
    chosen, guard = found
    if (refusal := _copy_too_dear(site, chosen, where.hardware)) is not None:
        return Left(name, "moe", "weight_copy", refusal)
    return Planned(name, chosen, guard, site.activation, path, foreign=site)


def _plan_existing(
    name: str, workload: Callable[[], tuple[Workload, Size]], where: Situation
) -> tuple[Plan, str | None] | Left:
    """``select`` for a block that is MoE already; what cannot be planned keeps its own form."""
    try:
        return select(name, *workload(), where)
    except errors.MoepassError as error:
        if where.options.strict:
            raise
        return Left(name, "moe", error.code, str(error), "fallback")


#: Joining separate gate and up weights may take this part of the predicted time of the experts.
_COPY_SHARE = 0.25


def _copy_too_dear(site: ForeignExperts, chosen: Plan, hw: Hardware) -> str | None:
    """Whether joining separate gate and up stacks (read and written at every call, and once more for their gradients)
    takes more than its share of the experts' predicted time."""
    price, work = chosen.chosen.predicted, chosen.workload
    if len(site.ups) == 1 or price is None:
        return None
    seconds = (2 + 2 * work.train) * _joined_bytes(work) / hw.bandwidth
    if seconds <= _COPY_SHARE * price.total:
        return None
    copied = f"{_joined_bytes(work) / 2**20:.1f} MiB are copied for {work.tokens} tokens"
    return f"{copied}: {seconds:.1e} s, the experts take {price.total:.1e} s"


def _joined_bytes(work: Workload) -> int:
    return work.E * work.n * work.F * work.D * work.itemsize


def select(name: str, work: Workload, size: Size, where: Situation) -> tuple[Plan, str | None]:
    """The plan for the range that ``size`` lies in, and the guard that this comparison installed."""
    work = work.model_copy(update={"routing": where.routing, "save_limit": where.options.save_limit})
    if where.tokens is not None:
        work, size = work.model_copy(update={"tokens": where.tokens}), where.tokens
    if where.pinned is not None:
        return _pinned(name, work, size, where.pinned, where)
    if isinstance(size, int):
        chosen = ranges(work, where.hardware, TokenRange(low=size, high=size))[0]
        return _measured(chosen, where), None
    low, high = _compat.size_bounds(size)
    unbacked = _compat.is_unbacked(size)
    plans = ranges(work, where.hardware, TokenRange(low=low, high=high), 1 if unbacked else 3)
    chosen = next((p for p in plans[:-1] if p.tokens.high is not None and size <= p.tokens.high), plans[-1])
    guard = f"{chosen.tokens} with T = {_compat.size_text(size)}" if len(plans) > 1 else None
    return _measured(chosen, where), guard


def _measured(chosen: Plan, where: Situation) -> Plan:
    work = chosen.workload
    if not where.options.measure or work.device == "meta":
        return chosen
    timings = measure(work, shortlist(work, where.hardware, lowerings()))
    remember(work.device, timings.facts(work))
    return plan_one(work, chosen.tokens, where.hardware, measured=timings)


def _pinned(name: str, work: Workload, size: Size, report: PlanReport, where: Situation) -> tuple[Plan, str | None]:
    def mismatch(detail: str) -> errors.PlanMismatch:
        return errors.PlanMismatch(path=pin_text(where.options.plan), detail=detail)

    entries = [s for s in report.sites if name in s.ids and s.status == "lowered"]
    if not entries:
        raise mismatch(f"it has no lowered site {name!r}")
    for entry in entries:
        tokens = entry.tokens or TokenRange()
        if size >= tokens.low and (tokens.high is None or size <= tokens.high):
            if (different := _other_shape(entry.workload, work)) is not None:
                raise mismatch(f"{name!r} has {different}")
            chosen = plan_one(work, tokens, where.hardware, pin=served_by(entry.lowering, work))
            return chosen, None if isinstance(size, int) else f"{tokens} with T = {_compat.size_text(size)}"
    raise mismatch(f"its entry for {name!r} does not cover T = {_compat.size_hint(size)}")


def _other_shape(theirs: Workload | None, ours: Workload) -> str | None:
    """The first size in which a pinned entry is of another block."""
    for letter in ("D", "F", "E", "K", "n"):
        if theirs is not None and getattr(theirs, letter) != getattr(ours, letter):
            return f"{letter}={getattr(ours, letter)} here and {getattr(theirs, letter)} there"
    return None


def dense_tensors(site: DenseFFN, pick: Sequence[torch.Tensor], nodes: Sequence[object]) -> DenseTensors:
    """A site's weights, given the values ``pick`` of its weight ``nodes`` (see ``weight_nodes``)."""
    value = dict(zip(nodes, pick, strict=True))
    return DenseTensors(
        ups=tuple(value[p.weight] for p in site.ups),
        up_biases=tuple(None if p.bias is None else value[p.bias] for p in site.ups),
        down=value[site.down.weight],
        down_bias=None if site.down.bias is None else value[site.down.bias],
    )


def weight_nodes(site: DenseFFN) -> list[torch.fx.Node]:
    """The nodes that hold a site's weights and biases, each once."""
    nodes = [n for p in (*site.ups, site.down) for n in (p.weight, p.bias) if n is not None]
    return list(dict.fromkeys(nodes))


def _layout(projection: Projection) -> Layout:
    return Layout(projection.rows, projection.transposed)


def dense_ids(found: Sequence[tuple[Path, DenseFFN | Rejected]], capture: Capture) -> list[str]:
    """The names of a graph's dense candidates, by the rule of ``moepass.convert`` (``graph.names.site_ids``)."""
    names = [_parameter_names(site, path, capture) for path, site in found]
    sites = iter(site_ids([n for n, (_, site) in zip(names, found, strict=True) if n and isinstance(site, DenseFFN)]))
    ids: list[str] = []
    for i, ((_, site), given) in enumerate(zip(found, names, strict=True)):
        if isinstance(site, Rejected):
            ids.append(site_id(given) if given else f"candidate_{i}")
        else:
            ids.append(next(sites) if given else f"ffn_{i}")
    return ids


def foreign_ids(found: Sequence[tuple[Path, ForeignExperts | Rejected]], capture: Capture) -> list[str]:
    """The names of a graph's existing expert computations: the modules that hold their weights."""
    ids: list[str] = []
    for i, (path, site) in enumerate(found):
        if isinstance(site, Rejected):
            nodes = site.weights
        else:
            nodes = holders(gemm.stack.node for gemm in (*site.ups, site.down))
        names = _fqns(nodes, path, capture)
        ids.append(site_id(names) if names else f"moe_{i}")
    return ids


def _fqns(nodes: Iterable[torch.fx.Node], path: Path, capture: Capture) -> list[str]:
    """The parameters' names behind the nodes of the graph at ``path``, as far as they have any."""
    outer = [capture.outer(path, chain, n) for chain in capture.chains(path)[:1] for n in nodes]
    return [name for name in map(parameter_fqn, outer) if name]


def _parameter_names(site: DenseFFN | Rejected, path: Path, capture: Capture) -> list[str]:
    """Names of a candidate's parameters, the first projection's weight first, as far as they have any."""
    if isinstance(site, Rejected):
        nodes = [n for n in site.output.all_input_nodes if n.op in ("placeholder", "get_attr")]
    else:
        nodes = weight_nodes(site)
    return _fqns(nodes, path, capture)
