"""The words that the text and the HTML view share: times, workloads, margins, warnings."""

from __future__ import annotations

from collections import Counter

from moepass.explain.report import PlanReport, SitePlan
from moepass.lowering.plan import Alternative, Workload


def seconds(value: float) -> str:
    """A duration with three significant digits: ``41.2 us``, ``1.93 ms``, ``2.5 s``."""
    for unit, scale in (("us", 1e6), ("ms", 1e3), ("s", 1.0)):
        scaled = value * scale
        if scaled < 999.5 or unit == "s":
            break
    digits = f"{scaled:.3g}" if scaled < 999.5 else f"{scaled:.0f}"
    return f"{digits} {unit}"


def cost(predicted: float | None, measured: float | None, corrected: float | None = None) -> str:
    """Every time there is, each labelled with where it comes from."""
    known = []
    if measured is not None:
        known.append(f"measured {seconds(measured)}")
    if corrected is not None:
        known.append(f"corrected {seconds(corrected)}")
    if predicted is not None:
        known.append(f"estimated {seconds(predicted)}")
    return ", ".join(known) or "not priced"


def alternative_cost(alternative: Alternative) -> str:
    """`cost` of an alternative."""
    price = alternative.predicted
    return cost(None if price is None else price.total, alternative.measured, alternative.corrected)


def shape(work: Workload) -> str:
    """The workload's sizes, without T."""
    sizes = f"E={work.E} K={work.K} D={work.D} F={work.F} {'gated' if work.n == 2 else 'ungated'}"
    extras = [" bias" if work.bias else ""]
    if work.capacity_factor is not None:
        extras.append(f" capacity_factor={work.capacity_factor:g}")
    return f"{sizes}{''.join(extras)} {work.dtype} {work.device}"


def tokens(site: SitePlan) -> str:
    """The range of T, and the mode it was planned for."""
    span = "any T" if site.tokens is None else str(site.tokens)
    if site.workload is None:
        return span
    return f"{span}, {'train' if site.workload.train else 'infer'}"


def choice(site: SitePlan) -> str:
    """The chosen lowering, its times, and the runner-up with the margin between them."""
    line = f"{site.lowering}   {cost(site.predicted, site.measured, corrected(site))}"
    if site.workload is not None and site.tokens is not None and site.tokens.low != site.tokens.high:
        line += f" at T = {site.workload.tokens}"
    rest = [a for a in site.alternatives if a.legal and a.lowering != site.lowering]
    if site.decided_by == "pin":
        line += "   (pinned)"
    if not rest:  # a block of expert parallelism in a graph has no alternatives: its form was chosen before
        alone = site.alternatives and site.decided_by != "pin"
        return line + ("   (the only legal lowering)" if alone else "")
    return f"{line}   ({runner_up(site, rest[0])})"


def corrected(site: SitePlan) -> float | None:
    """The corrected estimate of the chosen lowering, where there is one."""
    return next((a.corrected for a in site.alternatives if a.lowering == site.lowering), None)


def runner_up(site: SitePlan, other: Alternative) -> str:
    """The next best lowering and how much slower it is; compares measured with measured, estimate with estimate."""
    text = f"runner-up {other.lowering}: {alternative_cost(other)}"
    pairs = [
        ("measured", site.measured, other.measured),
        ("corrected", corrected(site), other.corrected),
        ("estimated", site.predicted, None if other.predicted is None else other.predicted.total),
    ]
    for label, ours, theirs in pairs:
        if ours and theirs:
            return f"{text}; {label} margin {theirs / ours:.2f}x"
    return text


def alarm(report: PlanReport) -> str | None:
    """The loud line for a report in which nothing was lowered."""
    counts = report.summary
    if counts["candidates"] == 0:
        return "0 SITES: no feed-forward block was found, so nothing was rewritten"
    if counts["lowered"] == 0:
        reasons = Counter(s.reason for s in report.sites for _ in s.ids)
        listed = ", ".join(f"{code} x{n}" for code, n in sorted(reasons.items(), key=lambda item: str(item[0])))
        return f"0 SITES LOWERED of {counts['candidates']} candidates, so nothing was rewritten ({listed})"
    return None


def assumptions(report: PlanReport) -> str:
    """What the estimates rest on."""
    named = sorted({site.workload.routing for site in report.sites if site.workload is not None}) or ["random"]
    return (
        f"estimates: cost model with the hardware profile {report.hardware}, {' and '.join(named)} routing, per block; "
        "train counts forward and backward"
    )
