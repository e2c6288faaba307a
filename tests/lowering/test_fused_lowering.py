"""Where the fused kernels are a candidate: on accelerators, for what they compute, and never unasked on a CPU."""

from __future__ import annotations

import pytest
import torch

from moepass import errors
from moepass.lowering import eager
from moepass.lowering.base import ExpertArgs
from moepass.lowering.fused import Fused
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import TokenRange, Workload
from moepass.lowering.planner import plan, ranges, served_by
from moepass.lowering.registry import lowerings

H200, CPU = Hardware.preset("H200"), Hardware.preset("cpu")
QWEN3 = Workload(tokens=64, D=2048, F=768, E=128, K=8, n=2, dtype="bfloat16", device="cuda")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"device": "cpu"}, "no_triton"),
        ({"dtype": "float64"}, "dtype"),
        ({"dropout": True}, "dropout"),
        ({"E": 513}, "experts"),
        ({"capacity_factor": 1.0}, "drops_tokens"),
    ],
)
def test_what_the_kernels_cannot_compute_is_refused_with_a_code(change, code):
    assert Fused().legal(QWEN3).legal
    assert Fused().legal(QWEN3.model_copy(update=change)).code == code


def test_an_interpreted_cpu_may_run_them_but_would_never_choose_them(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    work = QWEN3.model_copy(update={"device": "cpu", "dtype": "float32"})
    assert Fused().legal(work).legal
    assert plan(work, TokenRange(), CPU).lowering != "fused"
    assert plan(work, TokenRange(), CPU, pin="fused").lowering == "fused"


@pytest.mark.parametrize("train", [False, True])
def test_an_accelerator_gets_them_where_many_experts_share_few_rows(train):
    few = plan(QWEN3.model_copy(update={"train": train}), TokenRange(), H200)
    assert few.lowering == "fused"
    assert {a.lowering for a in few.alternatives} == set(lowerings())


@pytest.mark.parametrize(("hw", "legal"), [(H200, True), (CPU, False)])
def test_a_model_on_the_meta_device_is_planned_for_the_hardware(hw, legal):
    found = plan(QWEN3.model_copy(update={"device": "meta"}), TokenRange(), hw)
    assert next(a for a in found.alternatives if a.lowering == "fused").legal is legal


def test_a_limit_on_what_is_kept_decides_to_recompute_and_says_so():
    work = QWEN3.model_copy(update={"train": True})
    free = plan(work, TokenRange(), H200)
    kept = int(free.chosen.predicted.saved_bytes)
    tight = plan(work.model_copy(update={"save_limit": kept - 1}), TokenRange(), H200)
    assert (free.lowering, tight.lowering) == ("fused", "fused_recompute")
    assert tight.chosen.predicted.saved_bytes == 64 * 2048 * 2
    assert tight.chosen.predicted.total > free.chosen.predicted.total
    left_out = {a.lowering: a.detail for a in tight.alternatives if a.reason == "save_limit"}
    assert "it keeps 1.8 MiB" in left_out["fused"]
    assert plan(work.model_copy(update={"save_limit": kept}), TokenRange(), H200).lowering == "fused"


def test_where_every_lowering_keeps_more_than_the_limit_the_thriftiest_is_left():
    work = QWEN3.model_copy(update={"train": True, "save_limit": 0})
    assert {p.lowering for p in ranges(work, H200, TokenRange(low=2))} == {"fused_recompute"}
    assert plan(work.model_copy(update={"train": False}), TokenRange(), H200).lowering == "fused"


def test_recomputing_is_never_cheaper_and_only_for_a_backward_pass():
    for tokens in (1, 64, 4096, 1 << 17):
        work = QWEN3.model_copy(update={"train": True, "tokens": tokens, "E": 8, "K": 2})
        both = [lowerings()[name].price(work, H200) for name in ("fused", "fused_recompute")]
        assert both[0].total < both[1].total
        assert both[0].flops < both[1].flops
        assert both[0].saved_bytes - both[1].saved_bytes == 2 * work.R * work.F * 2
    assert lowerings()["fused_recompute"].legal(QWEN3).code == "inference"
    assert served_by("fused_recompute", QWEN3) == "fused"
    assert served_by("fused_recompute", work) == "fused_recompute"


def test_a_few_tokens_are_priced_as_streams_of_weights():
    one, five = (Fused().price(QWEN3.model_copy(update={"tokens": T}), H200) for T in (1, 5))
    weights = 8 * QWEN3.weight_elements * 2
    assert weights / H200.bandwidth < one.memory < 1.01 * weights / H200.bandwidth
    assert one.overhead < 3.1 * H200.launch < five.overhead
    assert one.compute < one.memory
    assert Fused().computed_rows([1, 0, 2], QWEN3.model_copy(update={"tokens": 1})) == 3


def test_padding_to_row_tiles_is_counted_as_computed():
    few, many = Workload(tokens=9, D=8, F=8, E=3, K=2, n=2), Workload(tokens=128, D=8, F=8, E=2, K=2, n=2)
    assert Fused().computed_rows([1, 0, 17], few) == 16 + 32
    assert Fused().computed_rows([200, 56], many.model_copy(update={"dtype": "bfloat16"})) == 256 + 128
    assert Fused().computed_rows([200, 56], many) == 256 + 64  # float32 has smaller tiles
    odd = Workload(tokens=170, D=8, F=8, E=64, K=6, n=2)  # its tiles are those of T = 256: 24 rows an expert
    assert Fused().computed_rows([1], odd) == 32


def test_dropout_is_refused_where_the_planner_was_not_asked():
    w_in, w_out = torch.ones(2, 8, 4), torch.ones(2, 4, 4)
    args = ExpertArgs(w_in, w_out, None, None, "silu(g)*u", dropout=0.5)
    x, index = torch.ones(3, 4), torch.zeros(3, 1, dtype=torch.int64)
    assert eager.workload(3, x, 1, args, train=True).dropout
    with pytest.raises(errors.FusedOperands, match=r"dropout=0.5"):
        Fused().build(x, index, torch.ones(3, 1), args)
