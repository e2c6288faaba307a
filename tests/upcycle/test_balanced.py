"""Balanced k-means: equal sizes, planted clusters found, near the optimal assignment, the same for any thread count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moepass.upcycle.balanced import assigned, balanced_labels


def planted(F, E, P, noise=0.1, seed=0):
    """Points around E centres, shuffled: ``(points [F, P], the centre of each [F])``."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.arange(E).repeat(F // E)[torch.randperm(F, generator=draw)]
    centres = torch.randn(E, P, generator=draw)
    return centres[truth] + noise * torch.randn(F, P, generator=draw), truth


@pytest.mark.parametrize(("F", "E", "P"), [(48, 4, 8), (256, 8, 16), (512, 16, 32), (96, 2, 4)])
def test_planted_clusters_are_found(F, E, P):
    points, truth = planted(F, E, P)
    label = balanced_labels(points, E, seed=0)
    assert torch.bincount(label).tolist() == [F // E] * E
    pairs = set(zip(label.tolist(), truth.tolist(), strict=True))
    assert len(pairs) == E, "each cluster is one of those that were planted"


@pytest.mark.parametrize("points", ["random", "equal", "crowded"])
def test_clusters_are_equally_large_whatever_the_points(points):
    draw = torch.Generator().manual_seed(1)
    x = {
        "random": torch.randn(60, 3, generator=draw),
        "equal": torch.zeros(60, 3),
        "crowded": torch.cat([torch.randn(55, 3, generator=draw) * 1e-3, torch.randn(5, 3, generator=draw) + 9]),
    }[points]
    assert torch.bincount(balanced_labels(x, 5, seed=0)).tolist() == [12] * 5


def test_seed_and_points_decide_and_threads_do_not():
    points = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    labels = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        labels.append(balanced_labels(points.clone(), 8, seed=3))
        torch.set_num_threads(before)
    assert torch.equal(*labels)
    assert not torch.equal(labels[0], balanced_labels(points.clone(), 8, seed=4))


def test_clusters_are_numbered_by_their_first_point():
    label = balanced_labels(planted(64, 4, 8)[0], 4, seed=0).tolist()
    assert [label.index(e) for e in range(4)] == sorted(label.index(e) for e in range(4))


@pytest.mark.parametrize(("F", "E", "P"), [(64, 4, 4), (256, 8, 4), (256, 8, 32), (512, 16, 32)])
def test_the_assignment_is_within_a_per_cent_of_the_optimal_one(F, E, P):
    draw = np.random.default_rng(0)
    points, centres = draw.standard_normal((F, P)), draw.standard_normal((E, P))
    distance = ((points[:, None] - centres) ** 2).sum(-1)
    label = assigned(distance)
    assert np.bincount(label).tolist() == [F // E] * E
    slots = np.repeat(distance, F // E, axis=1)
    best = slots[linear_sum_assignment(slots)].sum()
    assert distance[np.arange(F), label].sum() <= 1.01 * best
