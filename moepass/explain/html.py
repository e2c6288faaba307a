"""The HTML view: one self-contained page (no scripts, no network), readable on a phone, and printable.

Charts are drawn where matplotlib is installed and the report has sweeps; without it the page says how to get them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from moepass.explain import charts, phrases
from moepass.explain.groups import Group, group
from moepass.explain.report import PlanReport

_TEMPLATE = "report.html.j2"


def render(report: PlanReport) -> str:
    """The page.  Everything that comes from the report is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("moepass.explain").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        report=report, groups=[(sites, _charts(report, sites)) for sites in group(report)], phrases=phrases
    )


@dataclass(frozen=True)
class Charts:
    """What is drawn for a group of sites.  The SVG text is made here, from numbers and our own names."""

    caption: str
    time: Markup
    roofline: Markup


def _charts(report: PlanReport, sites: Group) -> Charts | str | None:
    """The charts of a group; a sentence where they cannot be drawn; None where there is nothing to draw."""
    works = {e.workload.model_copy(update={"tokens": 0}) for e in sites.entries if e.workload is not None}
    found = next((sweep for sweep in report.sweeps if sweep.workload in works), None)
    if found is None:
        return None
    if not charts.available():
        return "Charts need matplotlib: pip install 'moepass[charts]'"
    time, roof = charts.time_chart(found, sites.entries), charts.roofline(found)
    return Charts(charts.caption(found), Markup(time), Markup(roof))
