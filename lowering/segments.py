"""Cut a row of grid points into few segments, each served by one candidate, with little regret.

Pure dynamic programming; knows nothing of tokens or lowerings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """Grid points ``start <= i < stop`` served by ``lowering``."""

    start: int
    stop: int
    lowering: str


class _Score(NamedTuple):
    """What is minimised, in this order: the worst regret above the tolerance, then the sum of regrets."""

    excess: float
    total: float


def segment(costs: Mapping[str, Sequence[float]], most: int, tolerance: float) -> list[Segment]:
    """The fewest segments whose regret (cost over the point's best, minus one) is within ``tolerance`` at every point.

    ``costs``  cost of each candidate at each point; infinite where it must not serve.
    Where ``most`` segments cannot keep the tolerance, the segmentation with the least worst regret.
    """
    regrets = _regrets(costs)
    best: tuple[_Score, list[Segment]] | None = None
    for score, segments in _by_count(regrets, most, tolerance):
        if best is None or score.excess < best[0].excess:
            best = (score, segments)
        if score.excess == 0.0:
            break
    if best is None:
        raise ValueError("no grid points or no candidates")
    return best[1]


def _regrets(costs: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    points = len(next(iter(costs.values()), ()))
    cheapest = [min(row[i] for row in costs.values()) for i in range(points)]
    return {name: [_regret(row[i], cheapest[i]) for i in range(points)] for name, row in costs.items()}


def _regret(cost: float, cheapest: float) -> float:
    if cost == cheapest:
        return 0.0
    return cost / cheapest - 1.0 if cheapest > 0.0 else math.inf


def _by_count(
    regrets: Mapping[str, Sequence[float]], most: int, tolerance: float
) -> list[tuple[_Score, list[Segment]]]:
    """The best segmentation of all points into 1, 2, ... ``most`` segments."""
    points = len(next(iter(regrets.values()), ()))
    spans = _best_spans(regrets, points, tolerance)
    answers: list[tuple[_Score, list[Segment]]] = []
    previous: dict[int, tuple[_Score, list[Segment]]] = {0: (_Score(0.0, 0.0), [])}
    for _ in range(min(most, points)):
        current: dict[int, tuple[_Score, list[Segment]]] = {}
        for (start, stop), (score, name) in spans.items():
            if start not in previous:
                continue
            before, segments = previous[start]
            joined = _Score(max(before.excess, score.excess), before.total + score.total)
            if stop not in current or joined < current[stop][0]:
                current[stop] = (joined, [*segments, Segment(start, stop, name)])
        answers += [current[points]] if points in current else []
        previous = current
    return answers


def _best_spans(
    regrets: Mapping[str, Sequence[float]], points: int, tolerance: float
) -> dict[tuple[int, int], tuple[_Score, str]]:
    """The best single candidate of every span of points."""
    spans: dict[tuple[int, int], tuple[_Score, str]] = {}
    for name, row in regrets.items():
        for start in range(points):
            worst, total = 0.0, 0.0
            for stop in range(start + 1, points + 1):
                worst, total = max(worst, row[stop - 1]), total + row[stop - 1]
                score = _Score(worst if worst > tolerance else 0.0, total)
                if (start, stop) not in spans or score < spans[start, stop][0]:
                    spans[start, stop] = (score, name)
    return spans
