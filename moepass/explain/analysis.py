"""What ``explain --analyze`` measured: kept apart from the plan, so that no decision and no fingerprint depends on it.

Seconds are medians of runs on this machine; bytes are what tensors held at the peak above the start of the call.

Letters: T tokens, E experts, K top-k; a pair is one token with one of its experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Self

from pydantic import Field, model_validator

from moepass.frozen import Frozen


class Timing(Frozen):
    """One lowering, run on a site's operands.

    ``seconds``       median of ``runs``; None where it failed.  ``fastest``, ``slowest``: the ends of what was seen
    ``peak_bytes``    memory at the peak; None where it is not known
    ``padding_rows``  rows that its GEMMs computed for nobody
    """

    lowering: str
    seconds: float | None = Field(None, gt=0)
    fastest: float | None = Field(None, gt=0)
    slowest: float | None = Field(None, gt=0)
    runs: int = Field(0, ge=0)
    peak_bytes: int | None = Field(None, ge=0)
    padding_rows: int = 0
    failed: str | None = None


class SiteAnalysis(Frozen):
    """What one site did, at one token count.

    ``tokens``      T of a call; ``calls``: how often the site was called
    ``load``        pairs that each expert was sent, all calls together: ``[E]``
    ``dropped``     pairs lost to a full expert; ``unrouted``: pairs that the model itself gave to no expert
    ``timings``     by lowering, fastest first, failed last; empty where another site's stand for it
    ``timed_as``    the site whose timings these are: itself, or one of equal shape and plan
    ``skipped``     why nothing was run here
    """

    id: str
    tokens: int = Field(ge=0)
    train: bool = False
    calls: int = Field(1, ge=0)
    load: tuple[int, ...] = ()
    dropped: int = 0
    unrouted: int = 0
    timed_as: str | None = None
    timings: tuple[Timing, ...] = ()
    skipped: str | None = None

    @model_validator(mode="after")
    def _timings_are_its_own(self) -> Self:
        if self.timings and self.timed_as != self.id:
            raise ValueError("timings stand at the site that was timed")
        return self

    @property
    def imbalance(self) -> float:
        """Load of the busiest expert over the mean; 0 without any."""
        return max(self.load) * len(self.load) / sum(self.load) if any(self.load) else 0.0

    @property
    def idle(self) -> int:
        """Experts that were sent nothing."""
        return sum(count == 0 for count in self.load)


class Analysis(Frozen):
    """A run of the model, or of its blocks alone.

    ``source``        where tokens, weights and routing came from, in words
    ``machine``       what the times depend on: processor, cores, threads, versions
    ``load_average``  of the machine when it began: other work disturbs the times (None: not known)
    """

    source: str
    machine: dict[str, str] = Field(default_factory=dict)
    load_average: float | None = None
    sites: tuple[SiteAnalysis, ...] = ()

    def merge(self, other: Analysis) -> Analysis:
        """Both; an entry of ``other`` replaces the one for the same site, T and mode."""
        sites = {_slot(s): s for s in (*self.sites, *other.sites)}
        source = self.source if self.source == other.source else f"{self.source}; {other.source}"
        return other.model_copy(update={"sites": tuple(sites.values()), "source": source})

    def timings(self, ids: Iterable[str], tokens: int, train: bool) -> tuple[Timing, ...]:
        """Of some sites of equal shape and plan at T = ``tokens``: per lowering the medians over those that were timed.

        Fastest first, failed last.
        """
        here = {(s.id, s.tokens, s.train): s for s in self.sites}
        asked = [here[key] for name in ids if (key := (name, tokens, train)) in here]
        timed = dict.fromkeys(s.timed_as for s in asked if s.timed_as is not None)
        found: dict[str, list[Timing]] = {}
        for source in (here[key] for name in timed if (key := (name, tokens, train)) in here):
            for timing in source.timings:
                found.setdefault(timing.lowering, []).append(timing)
        return tuple(sorted(map(_median, found.values()), key=order))


def order(timing: Timing) -> tuple[bool, float, str]:
    """Fastest first, failed last."""
    return (timing.seconds is None, timing.seconds or 0.0, timing.lowering)


def _slot(site: SiteAnalysis) -> tuple[str, int, bool]:
    return (site.id, site.tokens, site.train)


def _median(several: list[Timing]) -> Timing:
    """One timing of the same lowering at several sites: medians, and the ends of all."""
    good = [t for t in several if t.seconds is not None]
    if len(several) == 1 or not good:
        return several[0]
    peaks = [t.peak_bytes for t in good if t.peak_bytes is not None]
    return Timing(
        lowering=good[0].lowering,
        seconds=statistics.median(t.seconds for t in good if t.seconds is not None),
        fastest=min((t.fastest for t in good if t.fastest is not None), default=None),
        slowest=max((t.slowest for t in good if t.slowest is not None), default=None),
        runs=sum(t.runs for t in good),
        peak_bytes=max(peaks, default=None),
        padding_rows=round(statistics.median(t.padding_rows for t in good)),
    )
