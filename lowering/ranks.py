"""How routed rows spread over the ranks that hold the experts: expectations, never a measurement.

A rank (or a node) holds consecutive experts, E/G of them in each of G groups.  Under ``skew`` popularity has nothing
to do with an expert's number, so expectations are means over a few random placements, the same in every process.

Letters: N tokens of all ranks, E experts, K top-k, G groups (ranks or nodes).
Sources: the chance that a token misses a group of E/G experts is C(E-E/G, K)/C(E, K) (reference/kernels.md 2.1); rows
of a group are a sum over tokens, hence nearly normal; E[max] is the integral of one minus the product of the CDFs.
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter

from moepass.lowering import routing as spread

#: Random placements that an expectation under skew is a mean of.
PLACEMENTS = 8
#: Points of the integral for E[max], over six standard deviations each way.
_POINTS = 48
_WIDTH = 6.0


@functools.lru_cache(maxsize=1024)
def distinct_groups(E: int, K: int, G: int, routing: str) -> float:
    """Expected number of distinct groups in which the K experts of one token lie, its own group included."""
    if not spread.skew(routing):  # random and balanced: K distinct experts, all sets alike
        return G * (1.0 - math.comb(E - E // G, K) / math.comb(E, K))
    return sum(_hits(groups, K) for groups in _placements(E, K, G, routing)) / PLACEMENTS


def remote_groups(E: int, K: int, G: int, routing: str) -> float:
    """Expected distinct groups other than the token's own: ``(G-1)(1 - C(E-E/G,K)/C(E,K))`` under random routing."""
    return distinct_groups(E, K, G, routing) * (G - 1) / G


@functools.lru_cache(maxsize=4096)
def busiest_rows(N: int, E: int, K: int, G: int, routing: str) -> float:
    """Expected rows of the group that has the most of the N*K rows; at least the mean, at most what can meet there."""
    mean, most = N * K / G, float(N * min(K, E // G))
    if N == 0 or G == 1 or routing == "balanced":
        return min(float(math.ceil(mean)), most)
    if not spread.skew(routing):
        share = 1 / G
        variance = K * share * (1 - share) * (E - K) / max(E - 1, 1)  # of a hypergeometric draw
        expected = _expected_max(Counter({(mean, math.sqrt(N * variance)): G}))
    else:
        found = [_expected_max(_normals(N, groups)) for groups in _placements(E, K, G, routing)]
        expected = sum(found) / len(found)
    return min(max(expected, mean), most)


def imbalance(N: int, E: int, K: int, G: int, routing: str) -> float:
    """Rows of the busiest group over the mean."""
    return busiest_rows(N, E, K, G, routing) * G / (N * K) if N else 1.0


def _hits(groups: tuple[tuple[float, ...], ...], K: int) -> float:
    """Expected groups that K experts hit: experts are drawn on their own, given that K of all are."""
    drawn = _exactly(K, [q for group in groups for q in group])
    hits = 0.0
    for g, group in enumerate(groups):
        others = [q for i, other in enumerate(groups) if i != g for q in other]
        hits += 1.0 - math.prod(1.0 - q for q in group) * _exactly(K, others) / drawn
    return hits


def _exactly(K: int, chances: list[float]) -> float:
    """Probability that exactly K of independent events happen."""
    happened = [1.0] + [0.0] * K
    for q in chances:
        for k in range(K, 0, -1):
            happened[k] += q * (happened[k - 1] - happened[k])
        happened[0] *= 1.0 - q
    return happened[K]


@functools.lru_cache(maxsize=256)
def _placements(E: int, K: int, G: int, routing: str) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """For each placement, for each group: the chance of each of its experts to be among a token's K."""
    chances = [load.q for load in spread.loads(E, K, routing) for _ in range(load.experts)]
    size, found = E // G, []
    for seed in range(PLACEMENTS):
        dealt = list(chances)
        random.Random(seed).shuffle(dealt)
        found.append(tuple(tuple(dealt[g * size : (g + 1) * size]) for g in range(G)))
    return tuple(found)


def _normals(N: int, groups: tuple[tuple[float, ...], ...]) -> Counter[tuple[float, float]]:
    """Mean and deviation of each group's rows, and how many groups share them."""
    return Counter((N * sum(group), math.sqrt(N * sum(q * (1 - q) for q in group))) for group in groups)


def _expected_max(normals: Counter[tuple[float, float]]) -> float:
    """E[max] of independent normal variables."""
    low = max(mean - _WIDTH * deviation for mean, deviation in normals)
    high = max(mean + _WIDTH * deviation for mean, deviation in normals)
    step = (high - low) / _POINTS
    if step == 0.0:
        return low
    return low + step * sum(1.0 - _all_below(low + (i + 0.5) * step, normals) for i in range(_POINTS))


def _all_below(x: float, normals: Counter[tuple[float, float]]) -> float:
    product = 1.0
    for (mean, deviation), count in normals.items():
        below = 0.5 * (1.0 + math.erf((x - mean) / (deviation * math.sqrt(2)))) if deviation else float(x >= mean)
        product *= below**count
    return product
