"""Which neurons go together: features, the most active ones, routers from centroids."""

from __future__ import annotations

import pytest
import torch

from moepass import errors
from moepass.upcycle import neurons


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_an_order_is_a_permutation_with_equal_runs_that_ascend():
    order = neurons.clustered(neurons.by_weights([random(48, 8), random(48, 8, seed=1)]), 4, 0, "mlp")
    assert sorted(order.tolist()) == list(range(48))
    for part in order.chunk(4):
        assert part.tolist() == sorted(part.tolist())


def test_features_are_rows_of_length_one_for_each_projection():
    gate, up = random(12, 8), 3 * random(12, 8, seed=1)
    gate[5] = 0
    features = neurons.by_weights([gate, up], torch.tensor([5, 2]))
    torch.testing.assert_close(features[1, :8], gate[2] / gate[2].norm())
    torch.testing.assert_close(features[1, 8:], up[2] / up[2].norm())
    assert not features[0, :8].any(), "a row of zeros has no direction"


def test_working_in_pieces_changes_no_bit(monkeypatch):
    weights = [random(48, 8), random(48, 8, seed=1)]
    whole = neurons.by_weights(weights)
    monkeypatch.setattr(neurons, "_PIECE", 64)
    assert torch.equal(neurons.by_weights(weights), whole)
    assert torch.equal(neurons.by_activations(weights[0]), neurons.by_activations(weights[0], torch.arange(8)))


def test_neurons_that_fire_together_stand_together_whatever_their_sign():
    fires = torch.eye(4).repeat_interleave(3, 0)[
        torch.arange(12).view(4, 3).T.reshape(-1)
    ]  # neuron j on tokens of j % 4
    a = fires.repeat(1, 5).T * torch.tensor([1.0, -1.0]).repeat(6)
    order = neurons.clustered(neurons.by_activations(a + 0.01 * random(20, 12)), 4, 0, "mlp")
    assert [sorted(int(j) % 4 for j in part) for part in order.chunk(4)] == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]


def test_the_most_active_neurons_are_those_with_the_highest_mean_magnitude():
    a = random(100, 10)
    a[:, [7, 2, 5]] *= 10
    chosen = neurons.most_active(a, 3)
    assert chosen.tolist() == [2, 5, 7]
    assert neurons.rest_of(chosen, 10).tolist() == [0, 1, 3, 4, 6, 8, 9]
    assert neurons.most_active(torch.ones(4, 6), 2).tolist() == [0, 1], "ties go to the lower index"


def test_input_centroids_point_to_the_tokens_that_use_the_expert():
    x = random(6, 16).repeat_interleave(50, 0) + 0.1 * random(300, 16, seed=1) + 2.0  # what all tokens share
    a = torch.eye(6).repeat_interleave(50, 0).repeat_interleave(4, 1)  # expert e on the e-th kind of token
    rows = neurons.input_centroids(x, a, torch.arange(24), 6, 0.1)
    torch.testing.assert_close(rows.norm(dim=1), torch.full((6,), 0.1))
    assert ((x @ rows.T).argmax(1) == torch.arange(6).repeat_interleave(50)).float().mean() > 0.95
    torch.testing.assert_close(neurons.input_centroids(x + 5.0, a, torch.arange(24), 6, 0.1), rows, rtol=0, atol=1e-5)


def test_row_centroids_are_mean_rows_of_the_length_asked():
    gate, order = random(12, 8), torch.randperm(12)
    rows = neurons.row_centroids(gate, order, 3, 0.2)
    for e, part in enumerate(order.chunk(3)):
        mean = gate[part].mean(0)
        torch.testing.assert_close(rows[e], 0.2 * mean / mean.norm())


def test_weights_that_are_not_finite_are_refused_by_name():
    with pytest.raises(errors.BadOption, match=r"layers\.3\.mlp.*not all finite.*'split'"):
        neurons.clustered(torch.full((8, 2), float("nan")), 2, 0, "layers.3.mlp")
