"""Demands on a plan, for scripts and CI: ``'*.mlp=grouped'``, ``'layers.0.*=gathered|grouped'``, ``'*=lowered'``.

A demand is a glob over site names, ``=``, and what every entry of those sites must be: a lowering or a status.  A glob
that fits no site is not met: a plan without the block is not a plan with the right lowering.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

from moepass import errors
from moepass.explain import phrases
from moepass.explain.report import PlanReport, SitePlan, Status

_STATUSES = frozenset(get_args(Status))


@dataclass(frozen=True)
class Requirement:
    """``sites``: a glob; ``wanted``: lowerings or statuses, any of which will do."""

    sites: str
    wanted: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.sites}={'|'.join(self.wanted)}"


def parse(text: str, lowerings: Iterable[str]) -> Requirement:
    """``"GLOB=NAME|NAME"``.  Raises ``BadOption`` for another form, or a name that is no lowering and no status."""
    sites, equals, names = text.rpartition("=")
    wanted = tuple(name.strip() for name in names.split("|"))
    known = [*lowerings, *sorted(_STATUSES)]
    if not equals or not sites.strip():
        raise errors.BadOption(name="--require", value=text, detail="write GLOB=LOWERING, such as '*.mlp=grouped'")
    for name in wanted:
        if name not in known:
            detail = f"{name!r} is neither a lowering nor a status; use one of {', '.join(known)}"
            raise errors.BadOption(name="--require", value=text, detail=detail)
    return Requirement(sites.strip(), wanted)


def unmet(report: PlanReport, requirements: Iterable[Requirement]) -> list[str]:
    """One sentence for each demand and entry that fails it; empty where all are met."""
    return [line for requirement in requirements for line in _failures(report, requirement)]


def _failures(report: PlanReport, requirement: Requirement) -> Iterator[str]:
    entries = [(name, e) for e in report.sites for name in e.ids if fnmatch.fnmatchcase(name, requirement.sites)]
    if not entries:
        known = ", ".join(sorted({name for e in report.sites for name in e.ids})[:5]) or "none"
        yield f"{requirement}: no site has such a name (there are: {known})"
    for name, entry in entries:
        if not {entry.status, entry.lowering} & set(requirement.wanted):
            yield f"{requirement}: {name}, {phrases.tokens(entry)}: {_found(entry)}"


def _found(entry: SitePlan) -> str:
    return str(entry.lowering) if entry.status == "lowered" else f"{entry.status} {entry.reason}"
