"""Sweeps as text: a table of T against lowerings, the planner's choice marked, and the ranges it would use."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from moepass.explain import phrases
from moepass.explain.plain import plain
from moepass.lowering import routing
from moepass.lowering.plan import Sweep

_WIDTH = 100


def render(sweeps: Sequence[Sweep]) -> str:
    """Plain text, trailing newline."""
    if not sweeps:
        return "0 SITES: no feed-forward block was found that could be lowered\n"
    parts = [part for sweep in sweeps for part in (Text(_title(sweep)), Text(_chosen(sweep)), _table(sweep))]
    return plain(*parts, width=_WIDTH, separator="\n")


def to_json(sweeps: Sequence[Sweep]) -> str:
    """A list of sweeps as JSON, seconds and FLOPs unrounded."""
    return json.dumps([sweep.model_dump(mode="json") for sweep in sweeps], indent=2) + "\n"


def _title(sweep: Sweep) -> str:
    work = sweep.workload
    load = routing.heaviest(work.E, work.K, work.routing)
    title = (
        f"{phrases.shape(work)}, {'train' if work.train else 'infer'}, on {sweep.hardware}; {work.routing} routing "
        f"(busiest expert {load:.1f}x the mean)"
    )
    if work.mesh is None:
        return title
    held = "the same tokens on every rank" if work.same_tokens else "T tokens of each rank"
    return f"{title}\nmesh {work.mesh}; {held}; seconds of the busiest rank"


def _chosen(sweep: Sweep) -> str:
    if not sweep.choices:
        return "estimated; no form is possible on this mesh"
    return "estimated; chosen: " + "; ".join(f"{c.tokens}: {c.lowering}" for c in sweep.choices)


def _table(sweep: Sweep) -> Table:
    """Lowerings and forms that are not legal anywhere have no column."""
    curves = [curve for curve in sweep.curves if any(s is not None for s in curve.seconds)]
    table = Table("T", *(curve.lowering for curve in curves), box=None, padding=(0, 2, 0, 0))
    for i, T in enumerate(sweep.tokens):
        chosen = sweep.chosen(T) if sweep.choices else None
        cells = [_cell(curve.seconds[i], chosen=curve.lowering == chosen) for curve in curves]
        table.add_row(str(T), *cells)
    return table


def _cell(seconds: float | None, *, chosen: bool) -> Text:
    if seconds is None:
        return Text("-")
    return Text(phrases.seconds(seconds) + (" *" if chosen else ""))
