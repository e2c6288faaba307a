"""The text view of a ``PlanDiff``: one line per group of sites and range of T."""

from __future__ import annotations

from moepass.explain import phrases
from moepass.explain.diff import FieldChange, PlanDiff, SiteChange
from moepass.explain.groups import labels
from moepass.explain.plain import printable


def render(found: PlanDiff) -> str:
    """Plain text, trailing newline."""
    lines = [f"plan {found.before} -> {found.after}"]
    lines += [f"  {change.field}: {_values(change)}" for change in found.setting]
    if found.same:
        lines.append(f"same decisions at all {found.unchanged} sites")
        return "\n".join(lines) + "\n"
    changed = {site.id for site in found.sites}
    lines.append(f"{len(changed)} sites decided otherwise, {found.unchanged} as before")
    alike: dict[tuple[object, ...], list[SiteChange]] = {}
    for site in found.sites:
        alike.setdefault((site.mode, site.tokens, site.what, site.fields, site.times), []).append(site)
    for sites in alike.values():
        lines += [f"  {label}, {_line(sites[0])}" for label in labels([site.id for site in sites], changed)]
    return "\n".join(map(printable, lines)) + "\n"


def _line(site: SiteChange) -> str:
    where = f"{site.tokens}" + ("" if site.mode is None else f", {site.mode}")
    if site.what != "changed":
        side = [c.after if site.what == "added" else c.before for c in site.fields if c.field == "lowering"]
        return f"{where}: {site.what}" + (f" ({side[0]})" if side and side[0] is not None else "")
    text = f"{where}: " + "; ".join(_field(change) for change in site.fields)
    return text if site.times is None else f"{text}   ({_times(site)})"


def _field(change: FieldChange) -> str:
    return _values(change) if change.field == "lowering" else f"{change.field} {_values(change)}"


def _values(change: FieldChange) -> str:
    before, after = ("none" if v is None else v for v in (change.before, change.after))
    return f"{before} -> {after}"


def _times(site: SiteChange) -> str:
    assert site.times is not None
    t = site.times
    ratio = f", {t.after / t.before:.2f}x" if t.before > 0 else ""
    return f"{t.label} {phrases.seconds(t.before)} -> {phrases.seconds(t.after)}{ratio}"
