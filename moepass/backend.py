"""The torch.compile backend.  Reads like the table in DESIGN section 1; each stage is one call.

    capture -> recognise -> decide (plan) -> rewrite -> lower -> codegen -> report

Contract
    in     Dynamo's graph and its example inputs; the graph itself is never changed
    out    a callable with the graph's calling convention
    raises only for bad options and ranks that differ, or for anything at all under ``strict=True``; otherwise an
           internal failure compiles the model without the rewrite, says so once, and is in the report
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from torch import Tensor, fx

import moepass
from moepass import _compat, errors
from moepass.attach import Recipe, detached_on_failure, state_for
from moepass.decide import (
    STRICT_CODES,
    Left,
    Planned,
    Situation,
    decide_dense,
    decide_foreign,
    decide_semantic,
    dense_ids,
    dense_tensors,
    foreign_ids,
    weight_nodes,
)
from moepass.decide_ep import Parallel, decide_parallel, same_on_all_ranks
from moepass.explain import store, trace
from moepass.explain.report import GraphPlan, PlanReport, SitePlan
from moepass.graph import semantic
from moepass.graph.capture import Capture, Chain, Path
from moepass.graph.dense import recognise_all
from moepass.graph.foreign import find as foreign
from moepass.graph.foreign.emit import rewrite_foreign
from moepass.graph.foreign.site import ForeignExperts
from moepass.graph.rewrite import retarget, rewrite_dense
from moepass.graph.semantic import SemanticExperts
from moepass.graph.site import DenseFFN, Rejected
from moepass.kernels.rows_linear import DECOMPOSITIONS
from moepass.lowering.hardware import Hardware, load_hardware
from moepass.lowering.inline import lowered_op
from moepass.options import Options, pin_text

log = logging.getLogger("moepass.backend")

Decision = Planned | Parallel | Left


def moepass_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="moepass", options={...})``; see ``moepass.options.Options``."""
    return compile_graph(gm, example_inputs, Options.parse(options, mode))


def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Rewrite, plan, lower and compile one graph; on failure compile it as it came."""
    try:
        with detached_on_failure():
            program = transform(gm, inputs, options)
            same_on_all_ranks(program.parallel, _shared_facts(program.report, options))
            _publish(program.report, gm, program.capture.gm)  # before codegen, which owns and changes the graph
            return _codegen(program, options)
    except _compat.control_flow_exceptions():
        raise
    except Exception as error:
        if options.strict or isinstance(error, (errors.BadOption, errors.RanksDiffer)):
            raise
        return _fall_back(gm, inputs, options, error)


# --- the stages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Binding:
    """How one rewritten site finds its state at run time: positions of its dense weights among the inputs."""

    recipe: Recipe
    site: DenseFFN
    nodes: tuple[fx.Node, ...]
    positions: tuple[int, ...]
    first: int  # position of the first of its extra inputs

    def parameters(self, args: Sequence[Any]) -> list[Tensor]:
        """The MoE parameters of the weights that were actually given."""
        dense = dense_tensors(self.site, [args[p] for p in self.positions], self.nodes)
        return [p for p in state_for(self.recipe, dense).operands() if p is not None]


@dataclass(frozen=True)
class Program:
    """A graph ready for code generation."""

    capture: Capture
    bindings: tuple[Binding, ...]
    report: PlanReport
    parallel: tuple[Parallel, ...] = ()


def transform(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Program:
    """All stages up to code generation."""
    capture = Capture.of(gm, inputs)
    decisions = decide(capture, recognise(capture), options)
    bindings = rewrite(capture, [d for d in decisions if isinstance(d, Planned)])
    capture.gm.graph.lint()
    for _, body in capture.bodies():
        body.recompile()
    parallel = tuple(d for d in decisions if isinstance(d, Parallel))
    return Program(capture, tuple(bindings), report_of(decisions, capture, options), parallel)


@dataclass(frozen=True)
class Recognised:
    """Every site and near miss of a graph: our own ops' nodes, experts that other code spelled out, dense blocks."""

    semantic: tuple[SemanticExperts, ...]
    parallel: tuple[SemanticExperts, ...]
    foreign: tuple[tuple[Path, ForeignExperts | Rejected], ...]
    dense: tuple[tuple[Path, DenseFFN | Rejected], ...]


def recognise(capture: Capture) -> Recognised:
    """Find the sites.  Changes nothing, and depends on the graph alone: one walk serves every T that is planned."""
    return Recognised(
        tuple(semantic.find(capture)),
        tuple(semantic.find_parallel(capture)),
        tuple(foreign.recognise_all(capture.gm, capture.is_parameter)),
        tuple(recognise_all(capture.gm, is_parameter=capture.is_parameter)),
    )


def decide(
    capture: Capture, found: Recognised, options: Options, tokens: int | None = None, routing: str = "random"
) -> list[Decision]:
    """Plan every site, for T = ``tokens`` where given, priced with ``routing``.  Changes nothing."""
    device = device_of(capture.inputs)
    where = Situation(
        capture=capture,
        options=options,
        hardware=hardware_of(options, device),
        pinned=_pinned(options),
        train=torch.is_grad_enabled() and _any_requires_grad(capture.inputs),
        tokens=tokens,
        has_experts=bool(found.semantic or found.parallel or found.foreign),
        routing=routing,
    )
    dense = [
        decide_dense(site, path, name, where)
        for (path, site), name in zip(found.dense, dense_ids(found.dense, capture), strict=True)
    ]
    moe: list[Decision] = [decide_semantic(site, i, where) for i, site in enumerate(found.semantic)]
    moe += [decide_parallel(site, i, where) for i, site in enumerate(found.parallel)]
    moe += [
        decide_foreign(site, path, name, where)
        for (path, site), name in zip(found.foreign, foreign_ids(found.foreign, capture), strict=True)
    ]
    gathered = _compat.fsdp_unsharded()
    decisions = [_with_own_weights(d, capture, gathered) for d in dense] + moe
    if options.strict:
        _insist(decisions)
    return decisions


def rewrite(
    capture: Capture, planned: Sequence[Planned], done: Callable[[Planned], None] = lambda _: None
) -> list[Binding]:
    """Dense regions become semantic ops fed by attached state; every semantic op becomes its lowering's op.

    ``done`` is told of each decision when its nodes are there.
    """
    bindings: list[Binding] = []
    for i, decision in enumerate(planned):
        if decision.semantic is not None:
            retarget(decision.semantic.node, lowered_op(decision.plan.lowering))
        elif decision.foreign is not None:
            rewrite_foreign(capture, decision.path, decision.foreign, lowered_op(decision.plan.lowering))
        elif decision.dense is not None and decision.recipe is not None:
            bindings.extend(_rewrite_dense(capture, decision.dense, decision.recipe, decision, f"moepass_{i}"))
        done(decision)
    if left := semantic.leftovers(capture.gm):
        planned_ids = [p.id for p in planned]
        log.debug("semantic nodes %s keep their default body (planned: %s)", left, planned_ids)
    return sorted(bindings, key=lambda b: b.first)


def _rewrite_dense(capture: Capture, site: DenseFFN, recipe: Recipe, decision: Planned, prefix: str) -> list[Binding]:
    nodes = weight_nodes(site)
    chains = capture.chains(decision.path)
    places = {chain: _positions(capture, decision.path, chain, nodes) for chain in chains}
    state = state_for(recipe, dense_tensors(site, [capture.inputs[p] for p in places[chains[0]]], nodes))
    inserted = rewrite_dense(capture, decision.path, site, recipe.spec, state.operands(), prefix)
    retarget(inserted.experts, lowered_op(decision.plan.lowering))
    return [Binding(recipe, site, tuple(nodes), places[chain], first) for chain, first in inserted.firsts]


def _positions(capture: Capture, path: tuple[str, ...], chain: Chain, nodes: Sequence[fx.Node]) -> tuple[int, ...]:
    return tuple(capture.positions[capture.outer(path, chain, node)] for node in nodes)


def _codegen(program: Program, options: Options) -> Callable[..., Any]:
    """The inner compiler, fed with the attached parameters; the plan's identity is part of the cache keys."""
    bindings, inputs = program.bindings, program.capture.inputs
    extra = [_compat.static_example(p) for b in bindings for p in b.parameters(inputs)]
    patches: dict[str, Any] = {}
    if options.inner == "inductor":
        _compat.decompose_for_inductor(DECOMPOSITIONS)
        patches = _compat.plan_key_patches(_cache_key(program.report), options.inductor)
    return bound(_compat.compile_with(options.inner, program.capture.gm, [*inputs, *extra], patches), bindings)


def bound(compiled: Callable[..., Any], bindings: Sequence[Binding]) -> Callable[..., Any]:
    """``compiled`` with the state of the dense weights it is given looked up at every call."""
    if not bindings:
        return compiled

    def run(*args: Any) -> Any:
        return compiled(*args, *(p for b in bindings for p in b.parameters(args)))

    return run


def report_of(
    decisions: Sequence[Decision], capture: Capture, options: Options, kind: Literal["explain", "compile"] = "compile"
) -> PlanReport:
    """The plan report of one graph."""
    guards = sorted({d.guard for d in decisions if isinstance(d, Planned) and d.guard})
    device = device_of(capture.inputs)
    return PlanReport(
        kind=kind,
        hardware=hardware_of(options, device).name,
        device=device,
        settings=options.settings(),
        sites=tuple(d.report() for d in decisions),
        graphs=(GraphPlan(index=0, guards=tuple(guards)),),
    )


# --- fallback --------------------------------------------------------------------------------------------------------


def _fall_back(gm: fx.GraphModule, inputs: Sequence[Any], options: Options, error: Exception) -> Callable[..., Any]:
    """Compile the graph as it came; say so once; keep the reason in the report."""
    log.warning("compiled without the rewrite: %s: %s", type(error).__name__, error)
    log.debug("the failure in full", exc_info=error)
    code = error.code if isinstance(error, errors.MoepassError) else "internal_error"
    detail = f"{type(error).__name__}: {error}".splitlines()[0]
    site = SitePlan(id="(graph)", kind="dense_ffn", status="fallback", reason=code, detail=detail)
    device = device_of(inputs)
    report = PlanReport(
        hardware=hardware_of(options, device).name if code not in ("unknown_hardware", "bad_profile") else "unknown",
        device=device,
        settings=options.settings(),
        sites=(site,),
        notes=(f"compiled without the rewrite: {detail}",),
    )
    _publish(report, gm, gm)
    return _compat.compile_with(options.inner, gm, inputs, options.inductor)


def _publish(report: PlanReport, before: fx.GraphModule, after: fx.GraphModule) -> None:
    store.record(report)
    trace.emit(report, functools.partial(_compat.readable, before), functools.partial(_compat.readable, after))


def _with_own_weights(decision: Decision, capture: Capture, gathered: frozenset[int]) -> Decision:
    """A dense site is converted from real weights that belong to the model alone.

    DDP hands over fakes, and reduces the gradients of the parameters it knows only; what FSDP2 gathers is made anew at
    every step.  ``gathered``: identities of the latter.
    """
    if not isinstance(decision, Planned) or decision.dense is None:
        return decision
    for chain in capture.chains(decision.path):
        for node in weight_nodes(decision.dense):
            position = capture.positions.get(capture.outer(decision.path, chain, node))
            if position is None:
                return Left(decision.id, "dense_ffn", "weight_not_parameter", f"{node} is computed in the graph")
            weight = capture.inputs[position]
            if _compat.is_fake(weight):
                return Left(decision.id, "dense_ffn", "fake_inputs", f"{node} is a fake tensor", "fallback")
            if id(weight) in gathered:
                detail = f"{node} is gathered by FSDP2 for one step; convert before sharding"
                return Left(decision.id, "dense_ffn", "sharded_parameter", detail)
    if _compat.inside_ddp():
        detail = "DDP would not reduce the gradients of attached weights; use moepass.convert before wrapping"
        return Left(decision.id, "dense_ffn", "data_parallel", detail, "fallback")
    return decision


def _insist(decisions: Sequence[Decision]) -> None:
    """strict=True: a site that could have been lowered but was not is an error."""
    for d in decisions:
        if isinstance(d, Left) and (d.status == "fallback" or d.code in STRICT_CODES):
            raise errors.SiteRejected(where=d.id, reason=d.code, detail=d.detail)


# --- small questions -------------------------------------------------------------------------------------------------


def device_of(inputs: Sequence[Any]) -> str:
    """Device of the graph: that of the first input which is not on the CPU."""
    devices = [v.device.type for v in inputs if isinstance(v, Tensor)]
    return next((d for d in devices if d != "cpu"), "cpu")


def hardware_of(options: Options, device: str) -> Hardware:
    """The profile to plan for."""
    if isinstance(options.hardware, Hardware):
        return options.hardware
    return load_hardware(options.hardware, "cpu" if device == "meta" else device)


def _pinned(options: Options) -> PlanReport | None:
    if options.plan is None or isinstance(options.plan, PlanReport):
        report: PlanReport | None = options.plan
    else:
        try:
            report = PlanReport.from_json(FilePath(options.plan).read_text())
        except OSError as error:
            raise errors.BadOption(name="plan", value=str(options.plan), detail=str(error)) from None
    if report is not None and report.moepass_version != moepass.__version__:
        detail = f"it was made by moepass {report.moepass_version}, this is {moepass.__version__}"
        raise errors.PlanMismatch(path=pin_text(options.plan), detail=detail)
    return report


def _any_requires_grad(inputs: Sequence[Any]) -> bool:
    return any(isinstance(v, Tensor) and v.requires_grad for v in inputs)


def _shared_facts(report: PlanReport, options: Options) -> dict[str, str]:
    """What all ranks must compile with, blocks aside: not this graph's T, which may differ by rank."""
    pinned = _pinned(options)
    facts = {"sources": source_digest(), "hardware": report.hardware}
    facts["plan"] = "none" if pinned is None else pinned.fingerprint
    return facts | {f"options.{name}": str(value) for name, value in options.settings().items()}


def _cache_key(report: PlanReport) -> str:
    return f"moepass-{moepass.__version__}-{source_digest()}-{report.fingerprint}"


@functools.cache
def source_digest() -> str:
    """Hash of this installation's sources: op bodies are not part of torch's cache keys, so this is."""
    import moepass.kernels
    import moepass.lowering

    digest = hashlib.sha256()
    for package in (moepass, moepass.lowering, moepass.kernels):
        for file in sorted(FilePath(package.__path__[0]).rglob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
