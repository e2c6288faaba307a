"""What was measured for one line of the plan, joined with the estimates beside it: what text and HTML show.

Every value says which of the two it is; nothing here mixes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moepass.explain import phrases
from moepass.explain.analysis import Analysis, SiteAnalysis, Timing
from moepass.explain.report import PlanReport, SitePlan

_BARS = "·▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Row:
    """One lowering: its estimate (None: not priced at this T), and what was measured."""

    lowering: str
    chosen: bool
    estimated: float | None
    timing: Timing

    @property
    def ratio(self) -> float | None:
        """Measured over estimated seconds."""
        return self.timing.seconds / self.estimated if self.timing.seconds and self.estimated else None


@dataclass(frozen=True)
class Observed:
    """A group of equal sites at one T.  ``sites``: those that have a routing or a refusal of their own."""

    tokens: int
    rows: tuple[Row, ...]
    sites: tuple[SiteAnalysis, ...]
    timed: int

    @property
    def skipped(self) -> str | None:
        """Why nothing was run."""
        return next((s.skipped for s in self.sites if s.skipped), None)

    @property
    def regret(self) -> tuple[float, str] | None:
        """Measured time of the chosen lowering over the fastest measured one, and that one's name."""
        timed = [row for row in self.rows if row.timing.seconds]
        chosen = next((row for row in timed if row.chosen), None)
        if chosen is None or chosen.timing.seconds is None or timed[0].timing.seconds is None:
            return None
        return chosen.timing.seconds / timed[0].timing.seconds, timed[0].lowering

    @property
    def loads(self) -> tuple[SiteAnalysis, ...]:
        """The sites that were sent anything."""
        return tuple(s for s in self.sites if any(s.load))


def observed(report: PlanReport, ids: Sequence[str], entry: SitePlan) -> tuple[Observed, ...]:
    """For each T that was run within an entry's range, ascending; empty without an analysis."""
    if report.analysis is None or entry.workload is None or entry.status != "lowered":
        return ()
    names, train = set(ids), entry.workload.train
    here = [s for s in report.analysis.sites if s.id in names and s.train == train]
    counts = sorted({s.tokens for s in here if entry.tokens is None or s.tokens in entry.tokens})
    return tuple(_at(report.analysis, [s for s in here if s.tokens == T], entry, T) for T in counts)


def _at(analysis: Analysis, sites: Sequence[SiteAnalysis], entry: SitePlan, tokens: int) -> Observed:
    prices = {a.lowering: a.predicted for a in entry.alternatives if a.legal}
    same = entry.workload is not None and entry.workload.tokens == tokens
    timings = analysis.timings([s.id for s in sites], tokens, sites[0].train)
    rows = (
        Row(
            lowering=t.lowering,
            chosen=t.lowering == entry.lowering,
            estimated=price.total if same and (price := prices.get(t.lowering)) is not None else None,
            timing=t,
        )
        for t in timings
    )
    return Observed(tokens, tuple(rows), tuple(sites), sum(bool(s.timings) for s in sites))


def lines(seen: Observed) -> list[str]:
    """Sentences for the text view."""
    found = [f"at T = {seen.tokens} nothing was measured: {seen.skipped}"] if seen.skipped else []
    if seen.rows:
        where = f" (medians over {seen.timed} sites)" if seen.timed > 1 else ""
        found.append(f"at T = {seen.tokens}{where}: " + "; ".join(map(timing, seen.rows)))
    if seen.regret is not None:
        found.append(f"measured regret {seen.regret[0]:.2f}x (fastest measured: {seen.regret[1]})")
    found.extend(f"{site.id}: {load(site)}   {bars(site.load)}" for site in seen.loads[:4])
    if len(seen.loads) > 4:
        worst = max(seen.loads, key=lambda site: site.imbalance)
        found.append(f"{len(seen.loads) - 4} more sites; the least even of all is {worst.id}: {load(worst)}")
    return found


def timing(row: Row) -> str:
    """``grouped measured 7.99 ms (6.1 to 9 ms, 5 runs), 0.98x of its estimate, peak 12 MiB, 3 padding rows``."""
    t = row.timing
    if t.seconds is None:
        return f"{row.lowering} failed ({t.failed})"
    parts = [f"{row.lowering} measured {phrases.seconds(t.seconds)}"]
    if t.fastest is not None and t.slowest is not None:
        parts[0] += f" ({phrases.seconds(t.fastest)} to {phrases.seconds(t.slowest)}, {t.runs} runs)"
    if row.ratio is not None:
        parts.append(f"{row.ratio:.2f}x of its estimate")
    if t.peak_bytes is not None:
        parts.append(f"peak {size(t.peak_bytes)}")
    if t.padding_rows:
        parts.append(f"{t.padding_rows} padding rows")
    return ", ".join(parts)


def load(site: SiteAnalysis) -> str:
    """How even a site's routing was, and what was lost."""
    parts = [f"busiest expert {site.imbalance:.2f}x the mean", f"{site.idle} of {len(site.load)} idle"]
    parts.append(f"{site.dropped} of {sum(site.load)} pairs dropped" if site.dropped else "0 dropped")
    if site.unrouted:
        parts.append(f"{site.unrouted} pairs without an expert")
    if site.calls > 1:
        parts.append(f"{site.calls} calls")
    return ", ".join(parts)


def bars(counts: Sequence[int]) -> str:
    """A bar for each expert (at most 64), relative to the busiest."""
    if not any(counts) or len(counts) > 64:
        return ""
    top = max(counts)
    return "".join(_BARS[-(-n * (len(_BARS) - 1) // top)] for n in counts)


def size(count: int) -> str:
    """Bytes with a fitting unit."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def circumstances(analysis: Analysis) -> str:
    """Where, on what and how the measurement was made."""
    m = analysis.machine
    parts = [m.get("processor", "this machine")]
    parts += [f"{m[name]} {name}" for name in ("cores", "threads") if name in m]
    if analysis.load_average is not None:
        parts.append(f"load average {analysis.load_average:g} before the run")
    return f"measured: medians of eager runs on {', '.join(parts)}; {analysis.source}"
