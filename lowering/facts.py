"""Measured times of workloads, and what they say about estimates near by.

A *fact* is the time of some lowerings on one workload, measured on this machine.  Where a plan is made for the very
same workload, it is taken for what it is.  For the same block at another T it corrects the estimates: by the ratio of
measured to estimated seconds, interpolated over log T between facts, and only within ``REACH`` of one.  A lowering that
was not timed there is taken to err as much as the one that erred most, so that an estimate never beats a measurement by
being optimistic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from moepass.frozen import Frozen
from moepass.lowering.plan import Workload

#: A fact speaks for token counts within this factor of its own.
REACH = 4.0
#: Bounds of a correction: beyond them something else is wrong.
LEAST, MOST = 1 / 16, 16.0


class Fact(Frozen):
    """Seconds by lowering on one workload: medians of ``runs`` runs at least.

    ``source``  who measured: ``measure`` (random operands) or ``analyze`` (a run of a model, or of its blocks)
    """

    work: Workload
    seconds: tuple[tuple[str, float], ...] = Field(min_length=1)
    source: Literal["measure", "analyze"]
    runs: int = Field(ge=1)

    @field_validator("seconds")
    @classmethod
    def _plausible(cls, seconds: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        if not all(0 < s < math.inf for _, s in seconds):
            raise ValueError("times are positive and finite")
        return tuple(sorted(seconds))

    @property
    def block(self) -> Workload:
        """The workload without its T."""
        return block(self.work)


def block(work: Workload) -> Workload:
    """A workload without its T, and without the limit that decides which lowerings may serve it."""
    return work.model_copy(update={"tokens": 0, "save_limit": None})


@dataclass(frozen=True)
class Point:
    """What a fact says at one T: measured over estimated seconds by lowering, and the largest such ratio."""

    tokens: int
    fact: Fact
    ratio: Mapping[str, float]

    @classmethod
    def of(cls, fact: Fact, estimates: Mapping[str, float]) -> Point:
        """``estimates``: seconds by lowering for the fact's own workload."""
        known = {name: s for name, s in fact.seconds if estimates.get(name, 0.0) > 0}
        return cls(fact.work.tokens, fact, {name: _bounded(s / estimates[name]) for name, s in known.items()})

    def factor(self, lowering: str) -> float:
        """By how much the estimate of a lowering is off here."""
        return self.ratio.get(lowering, max((1.0, *self.ratio.values())))


@dataclass(frozen=True)
class Corrections:
    """The points of one block, ascending in T."""

    points: tuple[Point, ...] = ()

    @classmethod
    def of(cls, points: Iterable[Point]) -> Corrections:
        """In order, and only points that say something."""
        return cls(tuple(sorted((p for p in points if p.ratio), key=lambda p: p.tokens)))

    def near(self, tokens: int) -> tuple[Point, ...]:
        """The points that speak for ``tokens``: at most one on each side."""
        below = [p for p in self.points if p.tokens <= tokens <= REACH * p.tokens][-1:]
        if below and below[0].tokens == tokens:
            return tuple(below)
        return (*below, *[p for p in self.points if tokens < p.tokens <= REACH * tokens][:1])

    def factor(self, lowering: str, tokens: int) -> float | None:
        """What the estimate is to be multiplied by; None where no fact speaks."""
        near = self.near(tokens)
        if not near:
            return None
        factors = [p.factor(lowering) for p in near]
        if len(near) == 1:
            return factors[0]
        low, high = near
        share = math.log(tokens / low.tokens) / math.log(high.tokens / low.tokens)
        return math.exp((1 - share) * math.log(factors[0]) + share * math.log(factors[1]))

    def at(self, tokens: int) -> Fact | None:
        """The fact of exactly this T."""
        return next((p.fact for p in self.points if p.tokens == tokens), None)

    def evidence(self, tokens: int) -> str | None:
        """What stands behind the numbers at this T, in words; None: estimates alone."""
        if (fact := self.at(tokens)) is not None:
            how = {"measure": "measure=True", "analyze": "--analyze"}[fact.source]
            return f"measured on this machine before, by {how} ({fact.runs} runs)"
        if not (near := self.near(tokens)):
            return None
        counts = ", ".join(str(p.tokens) for p in near)
        return f"estimates corrected by what was measured on this machine at T = {counts}"


def _bounded(ratio: float) -> float:
    return min(max(ratio, LEAST), MOST)
