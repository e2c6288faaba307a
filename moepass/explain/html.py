"""The HTML view: one self-contained page (no scripts, no network), readable on a phone, and printable.

Everything that comes from the report is escaped, and the page forbids itself to load or run anything.  Charts are drawn
where matplotlib is installed and the report has something to draw; without it the page says how to get them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from moepass.explain import charts, forms, graphs, observed, phrases
from moepass.explain.analysis import SiteAnalysis
from moepass.explain.groups import Group, group
from moepass.explain.observed import Observed
from moepass.explain.report import GraphPlan, PlanReport, SitePlan
from moepass.lowering.plan import Alternative, Sweep

_TEMPLATE = "report.html.j2"
#: Places where a graph changes that are shown; equal layers change alike.
_SHOWN_CHANGES = 2
NO_CHARTS = "Charts need matplotlib: pip install 'moepass[charts]'"


def render(report: PlanReport) -> str:
    """The page."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_source),
    )
    return environment.get_template(_TEMPLATE).render(
        report=report,
        sections=[_section(report, sites, i) for i, sites in enumerate(group(report))],
        graphs=[shown for graph in report.graphs if (shown := _graph(graph)) is not None],
        forms=forms,
        phrases=phrases,
        observed=observed,
    )


def _source(name: str) -> str:
    return resources.files("moepass.explain").joinpath(name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Chart:
    """A drawing, its words, and SVG text that we made from numbers and our own names."""

    caption: str
    svg: Markup


@dataclass(frozen=True)
class Line:
    """One lowering at one line of the plan; ``share``: its time in percent of the slowest shown."""

    lowering: str
    remark: str
    reason: str | None
    estimated: float | None
    measured: float | None
    share: float
    chosen: bool


@dataclass(frozen=True)
class Entry:
    """One token range of a section."""

    plan: SitePlan
    lines: tuple[Line, ...]
    seen: tuple[Observed, ...]

    @property
    def decided(self) -> bool:
        """Whether measured times took part in the decision."""
        return any(line.measured is not None for line in self.lines)


@dataclass(frozen=True)
class Section:
    """One kind of block."""

    anchor: str
    sites: Group
    entries: tuple[Entry, ...]
    charts: tuple[Chart, ...]
    loads: tuple[SiteAnalysis, ...]
    missing: str | None


@dataclass(frozen=True)
class Shown:
    """A graph before and after: the first places where it changes, and how many there are."""

    graph: GraphPlan
    changes: tuple[graphs.Change, ...]
    total: int


def _section(report: PlanReport, sites: Group, index: int) -> Section:
    entries = tuple(_entry(report, sites, plan) for plan in sites.entries)
    loads = {(s.id, s.tokens, s.train): s for entry in entries for seen in entry.seen for s in seen.loads}
    drawable = bool(loads) or _sweep(report, sites) is not None
    drawn = _charts(report, sites, entries, list(loads.values())) if drawable and charts.available() else []
    return Section(
        anchor=f"block-{index}",
        sites=sites,
        entries=entries,
        charts=tuple(drawn),
        loads=tuple(loads.values()),
        missing=NO_CHARTS if drawable and not charts.available() else None,
    )


def _entry(report: PlanReport, sites: Group, plan: SitePlan) -> Entry:
    times = [a.predicted.total for a in plan.alternatives if a.legal and a.predicted is not None]
    slowest = max(times, default=0.0)
    lines = []
    for a in plan.alternatives:
        seconds = a.predicted.total if a.legal and a.predicted is not None else None
        chosen = a.lowering == plan.lowering
        lines.append(
            Line(
                lowering=a.lowering,
                remark=_remark(a, chosen),
                reason=None if a.legal else a.reason,
                estimated=seconds,
                measured=a.measured,
                share=100 * seconds / slowest if seconds and slowest else 0.0,
                chosen=chosen,
            )
        )
    return Entry(plan, tuple(lines), observed.observed(report, sites.ids, plan))


def _remark(alternative: Alternative, chosen: bool) -> str:
    if not alternative.legal:
        return f"not possible: {alternative.detail}" if alternative.detail else "not possible"
    known = ["chosen"] if chosen else []
    if alternative.corrected is not None:
        known.append(f"corrected {phrases.seconds(alternative.corrected)}")
    return ", ".join(known)


def _sweep(report: PlanReport, sites: Group) -> Sweep | None:
    works = {e.workload.model_copy(update={"tokens": 0}) for e in sites.entries if e.workload is not None}
    return next((sweep for sweep in report.sweeps if sweep.workload in works), None)


def _charts(report: PlanReport, sites: Group, entries: Sequence[Entry], loads: Sequence[SiteAnalysis]) -> list[Chart]:
    found, drawn = _sweep(report, sites), []
    if found is not None:
        time = charts.time_chart(found, _measured(entries))
        drawn.append(Chart(f"Time over tokens. {charts.caption(found)}", _svg(time)))
        drawn.append(Chart("Roofline: one point for each token count, estimated", _svg(charts.roofline(found))))
    if loads:
        caption = "Load of each expert over its site's mean, measured; sites in the order of the table"
        drawn.append(Chart(caption, _svg(charts.heat_map(loads))))
    return drawn


def _svg(text: str) -> Markup:
    return Markup(charts.inline(text))


def _measured(entries: Sequence[Entry]) -> list[charts.Measured]:
    """Every measured time: those that decided, and those of the analysis."""
    found: list[charts.Measured] = []
    for entry in entries:
        if entry.plan.workload is not None:
            T = entry.plan.workload.tokens
            found += [(line.lowering, T, line.measured) for line in entry.lines if line.measured is not None]
        for seen in entry.seen:
            found += [(r.lowering, seen.tokens, r.timing.seconds) for r in seen.rows if r.timing.seconds is not None]
    return found


def _graph(graph: GraphPlan) -> Shown | None:
    if graph.before is None:
        return None
    found = () if graph.after is None else graphs.changes(graph.before, graph.after)
    return Shown(graph, found[:_SHOWN_CHANGES], len(found))
