"""The HTML view: one self-contained page (no scripts, no network), readable on a phone."""

from __future__ import annotations

from importlib import resources

import jinja2

from moepass.explain import phrases
from moepass.explain.groups import group
from moepass.explain.report import PlanReport

_TEMPLATE = "report.html.j2"


def render(report: PlanReport) -> str:
    """The page.  Everything that comes from the report is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("moepass.explain").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(report=report, groups=group(report), phrases=phrases)
