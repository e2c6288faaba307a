"""Balanced k-means: clusters of equal size.

Contract
    in    points_FP, F points of width P, float32 on the CPU, whose memory may be used; E, a divisor of F; a seed
    out   label_F: one of 0 .. E-1 for each point, each F/E times; clusters are numbered by their first point
    Deterministic from (points, E, seed), whatever the number of threads: everything runs in one.
Method: k-means (scikit-learn) for the centres; then, in rounds, points are assigned under the capacity F/E and centres
moved to their points, as long as that brings the points nearer.  Points are assigned by regret and then exchanged
between pairs of clusters: the optimal assignment has F x F costs, which have no room at a real width (F = 14336), and
on small problems this comes within a per cent of it.
Sources: MoEfication (Zhang et al. 2021) and LLaMA-MoE cluster neurons so, with their own balanced k-means.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from moepass import errors

#: Runs of k-means from different centres, of which the best counts, and steps of one at most.
_STARTS, _STEPS = 2, 30
#: Rounds of assignment and centres at most.
_ROUNDS = 8
#: What rounding may feign: distances are sums of squares of unit order.
_NOTHING = 1e-9
#: Times that all pairs of clusters exchange points at most.
_SWEEPS = 10


def balanced_labels(points_FP: Tensor, E: int, seed: int) -> Tensor:
    """``label_F``, int64.  Raises ``MissingPackage`` without scikit-learn."""
    kmeans, one_thread, not_converged = _sklearn()
    points = points_FP.numpy()
    with one_thread(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", not_converged)  # fewer different points than clusters
        start = kmeans(E, n_init=_STARTS, max_iter=_STEPS, random_state=seed % 2**32, copy_x=False).fit(points)
        label = _balanced(points, start.cluster_centers_)
    return from_numpy(_by_first_point(label, E))


def assigned(distance_FE: np.ndarray) -> np.ndarray:
    """Each point to one cluster, F/E points a cluster, as near as can be: ``label_F`` for these distances."""
    label = _by_regret(distance_FE)
    for _ in range(_SWEEPS):
        if not _exchange(label, distance_FE):
            break
    return label


def _exchange(label: np.ndarray, distance_FE: np.ndarray) -> bool:
    """The best exchange of points within every pair of clusters, in place; whether any was worth it."""
    E, changed = distance_FE.shape[1], False
    for a in range(E):
        for b in range(a + 1, E):
            in_a, in_b = np.flatnonzero(label == a), np.flatnonzero(label == b)
            from_a = distance_FE[in_a, a] - distance_FE[in_a, b]
            from_b = distance_FE[in_b, b] - distance_FE[in_b, a]
            by_a, by_b = np.argsort(-from_a, kind="stable"), np.argsort(-from_b, kind="stable")
            worth = int((from_a[by_a] + from_b[by_b] > _NOTHING).sum())  # the sums descend
            label[in_a[by_a[:worth]]], label[in_b[by_b[:worth]]] = b, a
            changed |= worth > 0
    return changed


def _by_regret(distance_FE: np.ndarray) -> np.ndarray:
    """A first assignment, near points first.

    In every round each point asks for its nearest open cluster.  Where too many ask for one, those stay that would lose
    most by the next best, and it closes; so it takes at most E rounds.
    """
    F, E = distance_FE.shape
    label, left, cost = np.full(F, -1), np.full(E, F // E), distance_FE.astype(np.float64)
    waiting = np.arange(F)
    while waiting.size:
        rows = cost[waiting]
        wish, nearest = rows.argmin(1), rows.min(1)
        rows[np.arange(len(rows)), wish] = np.inf
        regret = rows.min(1) - nearest
        asked = np.bincount(wish, minlength=E)
        crowded = np.flatnonzero(asked > left)
        if not crowded.size:
            label[waiting] = wish
            break
        for e in crowded:
            ask = waiting[wish == e]
            stay = ask[np.argsort(-regret[wish == e], kind="stable")[: left[e]]]
            label[stay], left[e], cost[:, e] = e, 0, np.inf
        waiting = waiting[label[waiting] < 0]
    return label


def _balanced(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    best, lowest = np.empty(0), np.inf
    for _ in range(_ROUNDS):
        distance = _distances(points, centres)
        label = assigned(distance)
        total = float(distance[np.arange(len(label)), label].sum())
        if total >= lowest:
            break
        best, lowest = label, total
        centres = np.stack([points[label == e].mean(0) for e in range(len(centres))])
    return best


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances ``[F, E]``, less the square of the point, which is the same for all clusters."""
    product = (points @ centres.T.astype(points.dtype)).astype(np.float64)
    distance: np.ndarray = (centres.astype(np.float64) ** 2).sum(1) - 2.0 * product
    return distance


def _by_first_point(label: np.ndarray, E: int) -> np.ndarray:
    first = np.array([np.flatnonzero(label == e)[0] for e in range(E)])
    number = np.empty(E, dtype=np.int64)
    number[np.argsort(first)] = np.arange(E)
    renamed: np.ndarray = number[label]
    return renamed


def _sklearn() -> tuple[Any, Any, type[Warning]]:
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise errors.MissingPackage(what="init 'cluster'", package="scikit-learn", install="moepass[upcycle]") from None
    return KMeans, threadpool_limits, ConvergenceWarning
