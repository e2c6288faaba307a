"""What changed between two plan reports: of two versions, shapes, or machines.

Contract
    in    two ``PlanReport``s
    out   ``PlanDiff``: what differs in the setting, and per site and range of T what was decided otherwise
    Decisions are compared, not prices: a plan whose estimates moved and whose choices stayed is the same plan.  Prices
    of a change stand beside it, estimate with estimate, measurement with measurement.
Ranges need not have the same borders: the T axis is cut at the borders of both, and neighbours with the same change are
joined again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from moepass.explain.report import PlanReport, Scalar, SitePlan, natural_key
from moepass.frozen import Frozen
from moepass.lowering.plan import TokenRange

#: Fields of a workload that a site's decision is compared by.
_SHAPE = ("D", "F", "E", "K", "n", "dtype", "device", "bias", "capacity_factor", "routing")


class FieldChange(Frozen):
    """One value that differs; ``None`` where a side has none."""

    field: str
    before: Scalar
    after: Scalar


class Times(Frozen):
    """Seconds of the chosen lowering, one kind of time only."""

    label: Literal["estimated", "measured"]
    before: float
    after: float


class SiteChange(Frozen):
    """One site over one range of T.  ``added``: only the second report plans it; ``removed``: only the first."""

    id: str
    mode: Literal["infer", "train"] | None
    tokens: TokenRange
    what: Literal["added", "removed", "changed"]
    fields: tuple[FieldChange, ...]
    times: Times | None = None


class PlanDiff(Frozen):
    """``same``: every decision for every site is the same, whatever the setting."""

    before: str
    after: str
    setting: tuple[FieldChange, ...]
    sites: tuple[SiteChange, ...]
    unchanged: int

    @property
    def same(self) -> bool:
        """Whether no site was decided otherwise."""
        return not self.sites

    def to_json(self) -> str:
        """JSON, indented, with ``same`` written out."""
        return json.dumps({**self.model_dump(mode="json"), "same": self.same}, indent=2) + "\n"


def diff(before: PlanReport, after: PlanReport) -> PlanDiff:
    """Compare two reports; sites are matched by name and mode (inference or training)."""
    ours, theirs = _by_site(before), _by_site(after)
    changes: list[SiteChange] = []
    unchanged = 0
    for key in sorted(ours.keys() | theirs.keys(), key=lambda k: (natural_key(k[0]), k[1] or "")):
        found = list(_site_changes(key, ours.get(key, []), theirs.get(key, [])))
        unchanged += not found
        changes += found
    return PlanDiff(
        before=before.fingerprint,
        after=after.fingerprint,
        setting=tuple(_setting(before, after)),
        sites=tuple(changes),
        unchanged=unchanged,
    )


_Key = tuple[str, Literal["infer", "train"] | None]


def _by_site(report: PlanReport) -> dict[_Key, list[SitePlan]]:
    found: dict[_Key, list[SitePlan]] = {}
    for site in report.sites:
        mode: Literal["infer", "train"] | None = None
        if site.workload is not None:
            mode = "train" if site.workload.train else "infer"
        for name in site.ids:
            found.setdefault((name, mode), []).append(site)
    return found


def _setting(before: PlanReport, after: PlanReport) -> Iterator[FieldChange]:
    for field in ("moepass_version", "torch_version", "hardware", "device"):
        yield from _change(field, getattr(before, field), getattr(after, field))
    for name in sorted(before.settings.keys() | after.settings.keys()):
        yield from _change(name, before.settings.get(name), after.settings.get(name))


def _site_changes(key: _Key, ours: list[SitePlan], theirs: list[SitePlan]) -> Iterator[SiteChange]:
    pending: SiteChange | None = None
    for span in _pieces([*ours, *theirs]):
        change = _compare(key, span, _at(ours, span), _at(theirs, span))
        joined = None if pending is None or change is None else _join(pending, change)
        if pending is not None and joined is None:
            yield pending
        pending = joined or change
    if pending is not None:
        yield pending


def _pieces(entries: Iterable[SitePlan]) -> list[TokenRange]:
    """The T axis, cut wherever an entry begins or ends."""
    spans = [entry.tokens or TokenRange() for entry in entries]
    starts = sorted({s.low for s in spans} | {s.high + 1 for s in spans if s.high is not None})
    ends: list[int | None] = [start - 1 for start in starts[1:]]
    return [TokenRange(low=low, high=high) for low, high in zip(starts, [*ends, None], strict=True)]


def _at(entries: list[SitePlan], span: TokenRange) -> SitePlan | None:
    return next((e for e in entries if span.low in (e.tokens or TokenRange())), None)


def _compare(key: _Key, span: TokenRange, ours: SitePlan | None, theirs: SitePlan | None) -> SiteChange | None:
    name, mode = key
    if ours is None and theirs is None:
        return None
    what: Literal["added", "removed", "changed"] = (
        "added" if ours is None else "removed" if theirs is None else "changed"
    )
    a, b = _decision(ours), _decision(theirs)
    fields = tuple(
        change for field in sorted(a.keys() | b.keys()) for change in _change(field, a.get(field), b.get(field))
    )
    if not fields:
        return None
    return SiteChange(id=name, mode=mode, tokens=span, what=what, fields=fields, times=_times(ours, theirs))


def _decision(site: SitePlan | None) -> dict[str, Any]:
    if site is None:
        return {}
    found: dict[str, Any] = {
        "status": site.status,
        "lowering": site.lowering,
        "reason": site.reason,
        "activation": site.activation,
        "init": site.init,
    }
    if site.workload is not None:
        found |= {name: getattr(site.workload, name) for name in _SHAPE}
    if site.ep is not None:
        found |= {"form": site.ep.form, "mesh": str(site.ep.workload.mesh)}
    return found


def _times(ours: SitePlan | None, theirs: SitePlan | None) -> Times | None:
    """Only of entries that were priced at the same T: a time at T=1 says nothing about one at T=512."""
    if ours is None or theirs is None or ours.workload is None or theirs.workload is None:
        return None
    if ours.workload.tokens != theirs.workload.tokens:
        return None
    if ours.measured is not None and theirs.measured is not None:
        return Times(label="measured", before=ours.measured, after=theirs.measured)
    if ours.predicted is not None and theirs.predicted is not None:
        return Times(label="estimated", before=ours.predicted, after=theirs.predicted)
    return None


def _join(first: SiteChange, second: SiteChange) -> SiteChange | None:
    """One change over two neighbouring ranges, where they say the same."""
    if first.tokens.high is None or first.tokens.high + 1 != second.tokens.low:
        return None
    if (first.what, first.fields, first.times) != (second.what, second.fields, second.times):
        return None
    return first.model_copy(update={"tokens": TokenRange(low=first.tokens.low, high=second.tokens.high)})


def _change(field: str, before: Any, after: Any) -> Iterator[FieldChange]:
    if before != after:
        yield FieldChange(field=field, before=before, after=after)
