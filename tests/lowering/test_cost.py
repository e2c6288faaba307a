"""The cost model against numbers worked out by hand and against the table of reference/kernels.md 2.4."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepass.lowering import cost
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import Workload

PRICES = {
    "fused": cost.price_fused,
    "dense": cost.price_dense,
    "gathered": cost.price_gathered,
    "grouped": cost.price_grouped,
    "capacity": cost.price_capacity,
}
H200 = Hardware.preset("H200")
CPU = Hardware.preset("cpu")
#: Round numbers: 1 GFLOP/s, 1 GB/s, no dispatch, no efficiency curves.
ROUND = Hardware(
    name="round", device="cpu", flops=(("float32", 1e9),), bandwidth=1e9, launch=0.0, dense=1.0, batched=1.0
)
SMALL = Workload(tokens=3, D=10, F=20, E=4, K=2, n=2)  # W = 600 elements, R = 6, A = 4*(1-1/8) = 3.5
OLMOE = {"D": 2048, "F": 1024, "E": 64, "K": 8}
MIXTRAL = {"D": 4096, "F": 14336, "E": 8, "K": 2}
QWEN3 = {"D": 2048, "F": 768, "E": 128, "K": 8}


def gpu(tokens: int, shape: dict[str, int], **more: object) -> Workload:
    return Workload.model_validate({"tokens": tokens, "n": 2, "dtype": "bfloat16", "device": "cuda", **shape, **more})


workloads = st.builds(
    Workload,
    tokens=st.integers(0, 5000),
    D=st.integers(1, 512),
    F=st.integers(1, 512),
    E=st.integers(4, 64),
    K=st.integers(1, 4),
    n=st.integers(1, 2),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    train=st.booleans(),
    capacity_factor=st.sampled_from([None, 1.0, 1.5]),
)


def test_dense_by_hand():
    price = cost.price_dense(SMALL, ROUND)
    assert price.flops == 2 * 600 * 3 * 4
    assert price.compute == pytest.approx(14400 / 1e9)
    assert price.memory == pytest.approx(4 * 600 * 4 / 1e9)  # four experts of 600 floats
    activations = 2 * 3 * 12 * 20 + 2 * 12 * 10 + 2 * 3 * 10  # (n+1)F and D for 12 rows, x and y
    assert price.overhead == pytest.approx(activations * 4 / 1e9)
    assert price.bytes == pytest.approx((4 * 600 + activations) * 4)
    assert price.saved_bytes == 0


def test_grouped_by_hand():
    price = cost.price_grouped(SMALL, ROUND)
    assert price.flops == 2 * 600 * 6
    assert price.memory == pytest.approx(3.5 * 600 * 4 / 1e9)
    assert price.overhead == pytest.approx((4 * 6 * 10 + 2 * 3 * 10 + 6 * 6 * 20) * 4 / 1e9)


def test_gathered_by_hand():
    price = cost.price_gathered(SMALL, ROUND)
    assert price.flops == 2 * 600 * 6
    assert price.bytes == 6 * 600 * 4  # every row reads its own expert
    assert price.memory == pytest.approx(14400 / 1e9)


def test_capacity_by_hand():
    price = cost.price_capacity(SMALL.model_copy(update={"capacity_factor": 1.25}), ROUND)
    assert price.flops == 2 * 600 * 4 * 2  # C = ceil(1.25*3*2/4) = 2


def test_ungated_experts_cost_two_thirds_of_gated_flops():
    ungated = SMALL.model_copy(update={"n": 1})
    for price in PRICES.values():
        assert price(ungated, ROUND).flops * 3 == pytest.approx(price(SMALL, ROUND).flops * 2)


def test_dispatch_counts_two_gemms_an_active_expert_and_two_matvecs_a_row():
    hw = ROUND.model_copy(update={"per_expert": 1.0, "per_row": 1.0, "fixed": (("gathered", 7.0), ("grouped", 5.0))})
    assert cost.price_grouped(SMALL, hw).overhead == pytest.approx(5 + 2 * 3.5, rel=1e-4)
    assert cost.price_gathered(SMALL, hw).overhead == pytest.approx(7 + 2 * 6, rel=1e-4)


def test_training_triples_flops_and_writes_the_whole_weight_gradient():
    train = SMALL.model_copy(update={"train": True, "tokens": 1})
    infer = SMALL.model_copy(update={"tokens": 1})
    for name in ("dense", "grouped", "gathered"):
        forward, step = PRICES[name](infer, ROUND), PRICES[name](train, ROUND)
        assert step.flops == pytest.approx(3 * forward.flops)
        assert step.bytes - forward.bytes > 4 * 600 * 4
        assert step.saved_bytes > 0
    gradient = 4 * 600 * 4
    grouped = cost.price_grouped(train, ROUND).memory * 1e9
    assert grouped == pytest.approx(2 * 2 * 600 * 4 + gradient)  # two active experts, forward and dX; all of dW


def test_large_weight_gradients_pay_page_faults_on_a_cpu_whatever_the_lowering():
    work = Workload(tokens=4, D=1024, F=1024, E=16, K=2, n=2, train=True)
    without = CPU.model_copy(update={"fresh": None})
    expected = 16 * 3 * 1024 * 1024 * 4 / CPU.fresh
    for name in ("dense", "grouped", "gathered"):
        assert PRICES[name](work, CPU).overhead - PRICES[name](work, without).overhead == pytest.approx(expected)


def test_backward_uses_its_own_efficiency_curve():
    forward, backward = ((1.0, 0.5), (2.0, 0.5)), ((1.0, 0.25), (2.0, 0.25))
    hw = ROUND.model_copy(update={"rows": (("float32", forward),), "rows_backward": (("float32", backward),)})
    step = cost.price_grouped(SMALL.model_copy(update={"train": True}), hw)
    assert step.compute == pytest.approx(7200 / 0.5e9 + 2 * 7200 / 0.25e9)


@pytest.mark.parametrize(
    ("tokens", "shape", "microseconds"),
    [
        (1, OLMOE, 196),
        (64, OLMOE, 209),
        (512, OLMOE, 630),
        (4096, OLMOE, 4900),
        (64, MIXTRAL, 689),
        (4096, QWEN3, 7400),
    ],
)
def test_dense_on_h200_agrees_with_the_reference_table(tokens, shape, microseconds):
    assert cost.price_dense(gpu(tokens, shape), H200).total * 1e6 == pytest.approx(microseconds, rel=0.3)


@pytest.mark.parametrize(
    ("tokens", "shape", "microseconds"),
    [
        (1, OLMOE, 38), (8, OLMOE, 140), (64, OLMOE, 209), (512, OLMOE, 247), (4096, OLMOE, 972), (16384, OLMOE, 3558),
        (64, MIXTRAL, 693), (4096, MIXTRAL, 5768), (1, QWEN3, 32), (512, QWEN3, 327), (16384, QWEN3, 2814),
    ],
)  # fmt: skip
def test_grouped_on_h200_agrees_with_the_hybrid_of_the_reference_table(tokens, shape, microseconds):
    assert cost.price_grouped(gpu(tokens, shape), H200).total * 1e6 == pytest.approx(microseconds, rel=0.1)


@pytest.mark.parametrize(("tokens", "microseconds"), [(1, 82), (8, 574), (64, 4500)])
def test_gathered_on_h200_agrees_with_the_batched_copy_of_the_reference_table(tokens, microseconds):
    assert cost.price_gathered(gpu(tokens, OLMOE), H200).total * 1e6 == pytest.approx(microseconds, rel=0.1)


def test_grouped_pays_a_host_loop_on_accelerators_outside_bfloat16():
    half = gpu(512, OLMOE)
    other = gpu(512, OLMOE, dtype="float16")
    gap = cost.price_grouped(other, H200).overhead - cost.price_grouped(half, H200).overhead
    assert gap == pytest.approx(2 * 64 * H200.per_expert, rel=1e-6)


@given(workloads, st.sampled_from(sorted(PRICES)), st.sampled_from([CPU, H200]))
def test_prices_are_finite_and_not_negative(work, name, hw):
    price = PRICES[name](work, hw)
    for value in (price.compute, price.memory, price.overhead, price.flops, price.bytes, price.saved_bytes):
        assert math.isfinite(value)
        assert value >= 0
    assert price.total >= max(price.compute, price.memory)


@given(workloads, st.sampled_from(sorted(PRICES)), st.sampled_from([CPU, H200]))
def test_flops_and_traffic_grow_with_tokens_and_training_costs_more(work, name, hw):
    price = PRICES[name]
    double = work.model_copy(update={"tokens": 2 * work.tokens + 1})
    assert price(double, hw).flops >= price(work, hw).flops
    assert price(double, hw).bytes >= price(work, hw).bytes
    forward = price(work.model_copy(update={"train": False}), hw)
    assert price(work.model_copy(update={"train": True}), hw).total >= forward.total


@pytest.mark.parametrize(
    ("tokens", "shape", "microseconds"),
    [
        (8, OLMOE, 134), (64, OLMOE, 201), (512, OLMOE, 242), (4096, OLMOE, 1021), (16384, OLMOE, 3736),
        (64, MIXTRAL, 688), (4096, MIXTRAL, 6498), (512, QWEN3, 314), (16384, QWEN3, 2920),
    ],
)  # fmt: skip
def test_fused_on_h200_agrees_with_the_gathering_tiles_of_the_reference_table(tokens, shape, microseconds):
    assert cost.price_fused(gpu(tokens, shape), H200).total * 1e6 == pytest.approx(microseconds, rel=0.1)


def test_fused_saves_the_tokens_and_the_pre_activations_only():
    price = cost.price_fused(gpu(4096, OLMOE, train=True), H200)
    assert price.saved_bytes == (2 * 4096 * 8 * 1024 + 4096 * 2048) * 2
    assert price.saved_bytes < 0.35 * cost.price_grouped(gpu(4096, OLMOE, train=True), H200).saved_bytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("train", [False, True])
def test_sorting_and_moving_rows_are_priced_where_they_were_measured(device, train):
    plain = Hardware.preset("cpu" if device == "cpu" else "H100")
    work = Workload(tokens=512, D=64, F=32, E=8, K=2, n=2, device=device, train=train, capacity_factor=1.0)
    sorting = Hardware.model_validate(dict(plain) | {"sort_row": 1e-6})
    slow = Hardware.model_validate(dict(plain) | {"gather": plain.bandwidth / 3})
    for price in (cost.price_grouped, cost.price_capacity):
        before = price(work, plain)
        assert price(work, sorting).overhead - before.overhead == pytest.approx(1024e-6), "T*K rows, once a step"
        assert price(work, slow).overhead > before.overhead
        assert price(work, slow).bytes == before.bytes
    for price in (cost.price_dense, cost.price_gathered):
        assert price(work, sorting) == price(work, slow) == price(work, plain), "these move no rows"
