"""``moepass.explain(model)(*args)``: the plan of a model, without rewriting or compiling it.

Contract
    in    a model or function, arguments (meta tensors suffice), the backend's options
    out   ``PlanReport`` of kind ``explain``: every number in it is an estimate
    The model's own graphs run once, unchanged, so that a model with graph breaks is seen whole.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from moepass import _compat, errors
from moepass.backend import Decision, decide, device_of, hardware_of, recognise, report_of
from moepass.decide import Planned
from moepass.explain.report import PlanReport
from moepass.graph.capture import Capture
from moepass.lowering import routing as spread
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import Sweep
from moepass.lowering.sweep import sweep
from moepass.options import Options


def explain(
    model_or_fn: Callable[..., Any],
    *,
    tokens: Sequence[int] | None = None,
    dynamic: bool | None = None,
    routing: str = "random",
    **options: Any,
) -> Callable[..., PlanReport]:
    """``moepass.explain(model, **options)(*args, **kwargs) -> PlanReport``.

    Traces the model on the given arguments with Dynamo, once, and prices every site with the options of the backend.
    ``tokens``: plan for these T instead of that of the arguments.  ``routing``: what prices assume of the router,
    ``random``, ``balanced`` or ``skew=NUMBER`` (``lowering.routing``).  Raises as the backend with ``strict``, and
    ``BadOption``.
    """
    parsed = Options.parse(options)
    check_routing(routing)
    target = getattr(model_or_fn, "_orig_mod", model_or_fn)

    def run(*args: Any, **kwargs: Any) -> PlanReport:
        reports: list[PlanReport] = []

        def collect(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            capture = Capture.of(gm, inputs)
            found = recognise(capture)
            decided = [decide(capture, found, parsed, T, routing) for T in tokens or (None,)]
            made = [report_of(decisions, capture, parsed, "explain") for decisions in decided]
            swept = _sweeps(itertools.chain(*decided), hardware_of(parsed, device_of(inputs)))
            reports.extend([made[0].model_copy(update={"sweeps": swept}), *made[1:]])
            forward: Callable[..., Any] = gm.forward
            return forward

        with _compat.many_recompiles():
            torch.compile(target, backend=collect, dynamic=dynamic)(*args, **kwargs)
        if not reports:
            return PlanReport(kind="explain", hardware=hardware_of(parsed, "cpu").name, device="cpu")
        return functools.reduce(PlanReport.merge, reports)

    return run


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
