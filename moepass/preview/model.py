"""``moepass.explain(model)(*args)``: the plan of a model, without rewriting or compiling it.

Contract
    in    a model or function, arguments (meta tensors suffice), the backend's options
    out   ``PlanReport`` of kind ``explain``: every number in it is an estimate
          with ``analyze=True`` of kind ``analyze``: the same plan, and what was measured, in ``report.analysis``
    The model's own graphs run once, so that a model with graph breaks is seen whole: unchanged, or for an analysis
    rewritten as planned (``preview.analyze``), after which nothing stays attached.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from moepass import _compat, errors
from moepass.attach import detached_on_failure
from moepass.backend import Decision, decide, device_of, hardware_of, recognise, report_of
from moepass.decide import Planned
from moepass.explain.graphs import tidy
from moepass.explain.report import PlanReport
from moepass.graph.capture import Capture
from moepass.lowering import routing as spread
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import Sweep
from moepass.lowering.sweep import sweep
from moepass.options import Options
from moepass.preview import analyze as analysis
from moepass.preview.analyze import Rewritten
from moepass.preview.mesh import Spread, over_ranks
from moepass.preview.probe import Probes

log = logging.getLogger("moepass.explain")

#: Where the numbers of an analysis come from, unless somebody knows better.
OWN_INPUTS = "the model's own weights and the given inputs"


def explain(
    model_or_fn: Callable[..., Any],
    *,
    tokens: Sequence[int] | None = None,
    dynamic: bool | None = None,
    routing: str = "random",
    analyze: bool = False,
    graphs: bool = False,
    mesh: Spread | str | None = None,
    source: str = OWN_INPUTS,
    **options: Any,
) -> Callable[..., PlanReport]:
    """``moepass.explain(model, **options)(*args, **kwargs) -> PlanReport``.

    Traces the model on the given arguments with Dynamo, once, and prices every site with the options of the backend.
    ``tokens``: plan for these T instead of that of the arguments.  ``routing``: what prices assume of the router,
    ``random``, ``balanced`` or ``skew=NUMBER`` (``lowering.routing``).  ``analyze``: run it, and measure (a model on
    the meta device: its blocks alone); ``source``: what to say of its weights and inputs.  ``graphs``: keep the graph
    before and after as source.  ``mesh``: spread the experts over ranks that need not exist, such as
    ``"node=16,ep=8"`` (``preview.mesh``), T being a rank's tokens.  Raises as the backend with ``strict``, and
    ``BadOption``.
    """
    parsed = Options.parse(options)
    check_routing(routing)
    asked = Spread(mesh) if isinstance(mesh, str) else mesh
    if asked is not None:
        asked.check(parsed.hardware, analyze=analyze)
    target = getattr(model_or_fn, "_orig_mod", model_or_fn)

    def run(*args: Any, **kwargs: Any) -> PlanReport:
        reports: list[PlanReport] = []
        probes: dict[str, Probes] = {}

        def collect(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            capture, device = Capture.of(gm, inputs), device_of(inputs)
            found, hw = recognise(capture), hardware_of(parsed, device)
            decided = [decide(capture, found, parsed, T, routing) for T in tokens or (None,)]
            made = [report_of(decisions, capture, parsed, "explain") for decisions in decided]
            swept = _sweeps(itertools.chain(*decided), hw)
            made[0] = made[0].model_copy(update={"sweeps": swept})
            forward: Callable[..., Any] = gm.forward
            run_it = analyze and device != "meta"
            if run_it:
                _check_analysis(tokens, device, hw)
            rewritten = _rewritten(capture, decided[0], must=run_it) if run_it or graphs else None
            if graphs:
                made = [_with_source(report, gm, rewritten) for report in made]
            reports.extend(made)
            if rewritten is None or not run_it:
                return forward
            return rewritten.runnable(probes.setdefault(device, Probes(hw)))

        with _compat.many_recompiles(), detached_on_failure(always=True):
            before = analysis.analysis(source, "cpu")  # the load average is that before the run
            with _plain_refusals():
                torch.compile(target, backend=collect, dynamic=dynamic)(*args, **kwargs)
        if not reports:
            return PlanReport(kind="explain", hardware=hardware_of(parsed, "cpu").name, device="cpu")
        report = functools.reduce(PlanReport.merge, reports)
        if asked is not None:
            return over_ranks(report, asked, hardware_of(parsed, report.device.split("+")[-1]))
        if not analyze:
            return report
        if report.device == "meta":
            return analysis.drawn(report, hardware_of(parsed, "meta"), routing)
        return analysis.measured(report, before, probes)

    return run


@contextlib.contextmanager
def _plain_refusals() -> Iterator[None]:
    """A ``BadOption`` that the collecting backend raised, without what Dynamo wraps it in."""
    try:
        yield
    except Exception as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, errors.BadOption):
            raise inner from None
        raise


def _check_analysis(tokens: Sequence[int] | None, device: str, hw: Hardware) -> None:
    """Raise ``BadOption`` for what a run cannot do."""
    if tokens is not None:
        detail = "an analysis runs the arguments as they are; call it with arguments of that many tokens"
        raise errors.BadOption(name="tokens", value=tuple(tokens), detail=detail)
    analysis.check_device(device, hw)


def _rewritten(capture: Capture, decisions: Sequence[Decision], *, must: bool) -> Rewritten | None:
    """The graph as planned.  None where weights would be needed to make it (a conversion that reads them), unless it
    must be."""
    try:
        return Rewritten.of(capture, decisions)
    except (errors.MoepassError, NotImplementedError, RuntimeError):
        if must:
            raise
        log.info("the rewritten graph is not shown: it needs the weights", exc_info=True)
        return None


def _with_source(report: PlanReport, gm: fx.GraphModule, rewritten: Rewritten | None) -> PlanReport:
    (graph,) = report.graphs
    source = {"before": tidy(_compat.readable(gm)), "after": None if rewritten is None else tidy(rewritten.source())}
    return report.model_copy(update={"graphs": (graph.model_copy(update=source),)})


def _sweeps(decisions: Iterable[Decision], hw: Hardware) -> tuple[Sweep, ...]:
    """One for each kind of block: layers of equal shape share it, and so do all token counts."""
    planned = [d.plan.workload for d in decisions if isinstance(d, Planned)]
    return tuple(sweep(work, hw) for work in dict.fromkeys(w.model_copy(update={"tokens": 0}) for w in planned))


def check_routing(name: str) -> None:
    """Raise ``BadOption`` for a routing that ``lowering.routing`` does not know."""
    try:
        spread.skew(name)
    except ValueError as error:
        raise errors.BadOption(name="routing", value=name, detail=str(error)) from None
