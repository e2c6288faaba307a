"""How tokens spread over experts: expectations against exact sums and against draws."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from moepass.lowering import cost, routing
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import Workload

E, K, TILE = 16, 3, 8


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (5, 2), (40, 2), (300, 3)])
def test_padded_rows_equal_the_exact_expectation(tokens, top_k):
    p = top_k / E
    exact = sum(
        math.comb(tokens, m) * p**m * (1 - p) ** (tokens - m) * math.ceil(m / TILE) * TILE for m in range(tokens + 1)
    )
    assert routing.padded_rows(tokens, E, top_k, "random", TILE) == pytest.approx(E * exact, rel=0.02)


def test_padded_rows_when_every_expert_takes_every_token():
    assert routing.padded_rows(65, 2, 2, "random", 64) == 2 * 128


def draws(tokens: int, exponent: float, repeats: int = 300) -> torch.Tensor:
    """``[repeats, E]``: rows of each expert, from K draws without replacement a token."""
    p = torch.arange(1, E + 1, dtype=torch.float64) ** -exponent
    index = torch.multinomial(p.expand(repeats * tokens, E), K, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(repeats, E)
    return counts.scatter_add(1, index.view(repeats, -1), torch.ones(repeats, tokens * K))


@pytest.mark.parametrize("exponent", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_expectations_agree_with_draws(tokens, exponent):
    name = "random" if exponent == 0.0 else f"skew={exponent}"
    counts = draws(tokens, exponent)

    active = (counts > 0).sum(1).double().mean()
    padded = (torch.ceil(counts / TILE) * TILE).sum(1).mean()
    heaviest = counts.mean(0).max() / (tokens * K / E)

    assert routing.active_experts(tokens, E, K, name) == pytest.approx(float(active), rel=0.03)
    assert routing.padded_rows(tokens, E, K, name, TILE) == pytest.approx(float(padded), rel=0.05)
    # Independent clocks stand for draws without replacement; a single token's are noisy.
    assert routing.heaviest(E, K, name) == pytest.approx(float(heaviest), rel=0.25 if tokens == 1 else 0.1)


@pytest.mark.parametrize("name", ["random", "balanced", "skew=0.5", "skew=3"])
@pytest.mark.parametrize("tokens", [1, 7, 500])
def test_every_row_is_some_experts(name, tokens):
    shares = routing.rows_by_expert(tokens, E, K, name)

    assert sum(share for _, share in shares) == pytest.approx(1.0)
    assert all(rows <= tokens + 1e-6 for rows, _ in shares)
    assert routing.padded_rows(tokens, E, K, name, 1) == pytest.approx(tokens * K, rel=1e-3)


def test_balanced_routing_deals_rows_out_in_turn():
    assert routing.active_experts(2, E, K, "balanced") == 6
    assert routing.padded_rows(2, E, K, "balanced", TILE) == 6 * TILE
    assert routing.padded_rows(64, E, K, "balanced", TILE) == E * 16  # 12 rows each
    assert routing.heaviest(E, K, "balanced") == 1.0


def test_more_skew_means_fewer_active_experts_and_a_heavier_first():
    names = ["balanced", "random", "skew=0.5", "skew=1", "skew=2", "skew=4"]
    active = [routing.active_experts(8, E, K, name) for name in names]
    heaviest = [routing.heaviest(E, K, name) for name in names]
    assert active == sorted(active, reverse=True)
    assert heaviest == sorted(heaviest)
    assert heaviest[-1] <= E / K


@pytest.mark.parametrize("name", ["skewed", "skew", "skew=", "skew=-1", "skew=nan", "skew=inf", "zipf=2"])
def test_a_routing_that_is_not_known_is_refused(name):
    with pytest.raises(ValidationError, match="random, balanced, skew=NUMBER"):
        Workload(tokens=1, D=8, F=8, E=4, K=2, n=2, routing=name)


@pytest.mark.parametrize("preset", ["cpu", "H100"])
def test_prices_follow_the_routing(preset):
    hw = Hardware.preset(preset)
    work = Workload(tokens=16, D=256, F=512, E=64, K=4, n=2, dtype="bfloat16", device=hw.device)
    seconds = [
        cost.price_grouped(work.model_copy(update={"routing": name}), hw).total
        for name in ("balanced", "random", "skew=2")
    ]
    assert seconds[0] > seconds[1] > seconds[2]  # 16 tokens: weights that nobody asks for are not read
