"""What collectives move over the levels of a mesh, and how long they take: pure functions of sizes and links.

A level is a dimension of the mesh; levels come outermost first, with sizes s_1, s_2, ...; P is their product.

    gather     all-gather, or reduce-scatter, of m bytes of every rank, level by level (each level carries the copies
               that outer levels made):  sent_i = (s_i - 1) * s_1*...*s_(i-1) * m, together (P-1)*m.  Levels in turn
    reduce     all-reduce of M bytes as reduce-scatter and all-gather:  sent_i = 2 * (s_i-1) * s_1*...*s_(i-1) * M/P
    exchange   m bytes of every rank, spread evenly over all ranks; a byte crosses the outermost level at which its rank
               differs:  sent_i = m * (1 - 1/s_i) / (s_1*...*s_(i-1)), together (1 - 1/P)*m, the lower bound where every
               byte crosses once, in (s_i - 1) * s_(i+1)*... messages.  Levels work at the same time; the busiest rank
               receives ``peak`` times the mean
    in_turn    one after the other, on levels of their own

Sources: Thakur, Rabenseifner, Gropp 2005 (ring and doubling volumes); DeepEP (two-level exchange).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moepass.lowering.mesh import MeshDim


@dataclass(frozen=True)
class Way:
    """One way of an exchange: mean bytes that a rank sends on each level, seconds, and the part that is latency."""

    sent: tuple[float, ...]
    seconds: float
    latency: float

    def cut(self, chunks: int) -> float:
        """Seconds of one of ``chunks`` equal parts."""
        return self.latency + (self.seconds - self.latency) / chunks


def nothing(levels: Sequence[MeshDim]) -> Way:
    """No traffic."""
    return Way((0.0,) * len(levels), 0.0, 0.0)


def gather(levels: Sequence[MeshDim], own: float, collective: Literal["all_gather", "reduce_scatter"]) -> Way:
    """All-gather or reduce-scatter in which each rank contributes, or keeps, ``own`` bytes."""
    sent = tuple((level.size - 1) * outer * own for level, outer in zip(levels, _outer(levels), strict=True))
    return Way(
        sent,
        sum(level.link.seconds(collective, m, level.size) for level, m in zip(levels, sent, strict=True)),
        sum(level.link.start(collective, level.size) for level in levels),
    )


def reduce(levels: Sequence[MeshDim], whole: float) -> Way:
    """All-reduce of ``whole`` bytes."""
    P = math.prod(level.size for level in levels)
    sent = tuple(2 * (level.size - 1) * outer * whole / P for level, outer in zip(levels, _outer(levels), strict=True))
    return Way(
        sent,
        sum(level.link.seconds("all_reduce", m, level.size) for level, m in zip(levels, sent, strict=True)),
        sum(level.link.start("all_reduce", level.size) for level in levels),
    )


def exchange(levels: Sequence[MeshDim], own: float, peak: float = 1.0) -> Way:
    """All-to-all of ``own`` bytes of each rank, those for itself included."""
    sent = tuple(own * (1 - 1 / level.size) / outer for level, outer in zip(levels, _outer(levels), strict=True))
    inner = [math.prod(each.size for each in levels[i + 1 :]) for i in range(len(levels))]
    starts = [
        level.link.start("all_to_all", level.size) + level.link.gap * (level.size - 1) * ranks
        for level, ranks in zip(levels, inner, strict=True)
    ]
    moving = [
        level.link.seconds("all_to_all", peak * m, level.size) - level.link.start("all_to_all", level.size)
        for level, m in zip(levels, sent, strict=True)
    ]
    return Way(sent, sum(starts) + max(moving, default=0.0), sum(starts))


def send(level: MeshDim, sent: float, peak: float = 1.0) -> Way:
    """All-to-all along one level in which each rank sends ``sent`` bytes to the others."""
    own = sent / (1 - 1 / level.size)
    return exchange((level,), own, peak)


def in_turn(first: Way, then: Way) -> Way:
    """Both, one after the other, on levels of their own."""
    return Way(first.sent + then.sent, first.seconds + then.seconds, first.latency + then.latency)


def pipeline(chunks: int, dispatch: float, compute: float, combine: float) -> float:
    """Seconds until the last chunk is back, where the links and the experts work at the same time.

    Each chunk is dispatched, computed and combined in turn; a chunk's dispatch goes ahead of its predecessor's combine.
    """
    link = ready = dispatch
    experts = 0.0
    for chunk in range(chunks):
        arrived = ready
        if chunk + 1 < chunks:
            link += dispatch
            ready = link
        experts = max(experts, arrived) + compute
        link = max(link, experts) + combine
    return link


def _outer(levels: Sequence[MeshDim]) -> list[int]:
    """For each level, the product of the sizes outside it."""
    return [math.prod(level.size for level in levels[:i]) for i in range(len(levels))]
