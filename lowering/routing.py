"""How tokens spread over experts, as far as prices depend on it: a what-if, never a measurement.

``random``    every token draws its K experts uniformly and on its own
``balanced``  rows are dealt out in turn: every expert has the same number, give or take one
``skew=s``    the i-th most popular expert is drawn with a probability proportional to ``i**-s`` (Zipf): a router
              without a balancing loss; s = 0 is ``random``

Letters: T tokens, E experts, K top-k, R = T*K rows, ``q`` the probability that a token has a given expert among its K.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

#: Most that a share may be: a token has an expert at most once.
_CERTAIN = 1.0 - 1e-12


class Load(NamedTuple):
    """``experts`` experts of the same probability ``q``."""

    q: float
    experts: int


def skew(routing: str) -> float | None:
    """The exponent; 0 for ``random``, None for ``balanced``.  Raises ``ValueError`` for anything else."""
    if routing == "balanced":
        return None
    if routing == "random":
        return 0.0
    name, _, number = routing.partition("=")
    try:
        exponent = float(number)
    except ValueError:
        exponent = -1.0
    if name != "skew" or not 0 <= exponent < math.inf:
        raise ValueError(f"routing {routing!r} is not one of random, balanced, skew=NUMBER (such as skew=1.5)")
    return exponent


@functools.lru_cache(maxsize=256)
def loads(E: int, K: int, routing: str) -> tuple[Load, ...]:
    """The experts by how often a token has them; the probabilities sum to K.

    For K draws without replacement the shares are those of ``q = 1 - exp(-c*p)`` with c such that they sum to K: exact
    for exponential clocks stopped at a common time, and within sampling noise of real draws.
    """
    exponent = skew(routing)
    if not exponent or K == E:
        return (Load(K / E, E),)
    p = [(i + 1.0) ** -exponent for i in range(E)]
    low, high = 0.0, 1.0
    while _total(p, high) < K and high < 1e300:
        high *= 2.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(p, middle) < K else (low, middle)
    return tuple(Load(min(-math.expm1(-high * share), _CERTAIN), 1) for share in p)


def active_experts(T: int, E: int, K: int, routing: str) -> float:
    """Expected number of experts that have any row."""
    if routing == "balanced":
        return float(min(E, T * K))
    return sum(load.experts * _any(T, load.q) for load in loads(E, K, routing))


def heaviest(E: int, K: int, routing: str) -> float:
    """Expected rows of the busiest expert over the mean, for many tokens."""
    return 1.0 if routing == "balanced" else max(load.q for load in loads(E, K, routing)) * E / K


def rows_by_expert(T: int, E: int, K: int, routing: str) -> tuple[tuple[float, float], ...]:
    """``(rows, share)``: expected rows of an active expert, and the share of all R rows that such experts have."""
    if T == 0:
        return ((1.0, 1.0),)
    if routing == "balanced":
        return ((T * K / min(E, T * K), 1.0),)
    found = loads(E, K, routing)
    return tuple((T * load.q / _any(T, load.q), load.experts * load.q / K) for load in found if load.q > 0)


def padded_rows(T: int, E: int, K: int, routing: str, tile: int) -> float:
    """Expected rows after padding each expert's to whole tiles: ``tile * sum_e E[ceil(m_e/tile)]``."""
    if routing == "balanced":
        rows, more = divmod(T * K, E)
        return float(tile * ((E - more) * math.ceil(rows / tile) + more * math.ceil((rows + 1) / tile)))
    return sum(load.experts * _padded(T, load.q, tile) for load in loads(E, K, routing))


def _padded(T: int, q: float, tile: int) -> float:
    """``tile * E[ceil(m/tile)]`` for ``m ~ Bin(T, q)``."""
    if q >= _CERTAIN:
        return float(tile * math.ceil(T / tile))
    mean, deviation = T * q, math.sqrt(T * q * (1 - q))
    if mean > 3 * deviation + tile:
        return mean + (tile - 1) / 2
    top = min(T, int(mean + 8 * deviation) + 1)
    return tile * sum(_binomial(T, m, q) * math.ceil(m / tile) for m in range(1, top + 1))


def _binomial(T: int, m: int, q: float) -> float:
    log_choose = math.lgamma(T + 1) - math.lgamma(m + 1) - math.lgamma(T - m + 1)
    return math.exp(log_choose + m * math.log(q) + (T - m) * math.log1p(-q))


def _any(T: int, q: float) -> float:
    """Probability that at least one of T tokens has the expert."""
    return 1.0 if q >= 1.0 and T else -math.expm1(T * math.log1p(-min(q, _CERTAIN)))


def _total(p: list[float], c: float) -> float:
    return sum(-math.expm1(-c * share) for share in p)
