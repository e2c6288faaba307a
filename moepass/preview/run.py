"""``moepass explain MODEL`` without its printing: load, feed, trace once, plan for every token count."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from moepass import explain
from moepass.explain import targets
from moepass.explain.report import PlanReport
from moepass.preview.mesh import Spread


def explain_target(
    name: str,
    *,
    tokens: Sequence[int] = (),
    dtype: str | None = None,
    train: bool = False,
    routing: str = "random",
    analyze: bool = False,
    graphs: bool = False,
    mesh: Spread | None = None,
    **options: Any,
) -> PlanReport:
    """The report of MODEL as the command line names it (``explain.targets``).

    Traced once for all ``tokens``; with ``analyze`` a model that has weights is run for each of them.
    """
    if mesh is not None:
        mesh.check(options.get("hardware"), analyze=analyze)
    target = targets.load(name, dtype=targets.parse_dtype(dtype), train=train, real=analyze)
    wanted = {"analyze": analyze, "graphs": graphs, "mesh": mesh}
    options = {"routing": routing, **{name: value for name, value in wanted.items() if value}, **options}
    with torch.set_grad_enabled(train):
        if target.source is not None:
            return _run(target, tokens or target.tokens, options)
        counts = tuple(tokens) or tuple(t for t in target.tokens if t is not None)
        args, kwargs = target.feed(max(counts, default=None))
        return explain(target.model, tokens=counts or None, **options)(*args, **kwargs)


def _run(target: targets.Target, counts: Sequence[int | None], options: dict[str, Any]) -> PlanReport:
    reports = []
    for T in counts:
        args, kwargs = target.feed(T)
        reports.append(explain(target.model, source=target.source, dynamic=False, **options)(*args, **kwargs))
    return functools.reduce(PlanReport.merge, reports)
