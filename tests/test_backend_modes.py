"""Train, eval, no_grad, autocast, checkpointing, export, graph breaks, and dynamic token counts."""

from __future__ import annotations

import pytest
import torch
from tiny import FFN, D, Net, assert_close, compiled
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import moepass


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


# --- modes -----------------------------------------------------------------------------------------------------------


def test_train_eval_and_no_grad_share_one_state():
    model, x = Net(dropout=0.5), torch.randn(8, D)
    fast = compiled(model)
    fast(x)
    model.eval()
    assert_close(fast(x), model(x))
    with torch.no_grad():
        assert_close(fast(x), model(x))
    with torch.inference_mode():
        assert_close(fast(x), model(x))
    assert len(list(moepass.moe_parameters(model))) == 6


def test_state_made_in_inference_mode_can_be_trained():
    model, x = Net(1), torch.randn(8, D)
    fast = compiled(model)
    with torch.inference_mode():
        fast(x)
    fast(x).sum().backward()
    assert all(p.grad is not None for p in moepass.moe_parameters(model))


def test_dropout_in_training_mode_drops():
    model, x = Net(1, dropout=0.5), torch.randn(64, D)
    fast = compiled(model)
    assert not torch.equal(fast(x), fast(x))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_autocast_gives_the_dense_dtype_and_nearly_its_numbers(inner):
    model, x = Net(), torch.randn(16, D)
    fast = compiled(model, inner)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = model(x), fast(x)
    assert actual.dtype == expected.dtype
    assert_close(actual.float(), expected.float(), 2e-2)
    actual.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in moepass.moe_parameters(model))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_activation_checkpointing_finds_and_trains_the_ffn_in_the_sub_graph(inner):
    model, x = Net(), torch.randn(64, D)

    def run(x):
        for layer in model.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return x

    expected = run(x)
    actual = compiled(run, inner)(x)
    assert moepass.last_plan().summary["lowered"] == 2
    assert_close(actual, expected)
    actual.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in moepass.moe_parameters(model))


def test_mode_reduce_overhead_is_accepted():
    model, x = Net(1), torch.randn(8, D)
    assert_close(torch.compile(model, backend="moepass", mode="reduce-overhead")(x), model(x))


def test_exported_program_is_recognised_when_compiled():
    model, x = Net(), torch.randn(8, D)
    module = torch.export.export(model, (x,)).module()
    assert_close(compiled(module, fullgraph=False)(x), model(x))
    assert moepass.last_plan().summary["lowered"] == 2


def test_graph_breaks_leave_each_part_rewritten():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = FFN(), FFN()

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model, x = Broken(), torch.randn(8, D)
    assert_close(compiled(model, fullgraph=False)(x), model(x))
    assert len(list(moepass.moe_parameters(model))) == 6


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_dynamic_tokens_cross_a_threshold_and_come_back_with_one_compile_per_range():
    model = Net(1).eval()
    counter = CompileCounterWithBackend("moepass")
    fast = torch.compile(model, backend=counter, dynamic=True)
    plans = {}
    with torch.no_grad():
        for T in (4, 2000, 8, 3000, 16, 2500, 5):
            x = torch.randn(T, D)
            before = counter.frame_count
            assert_close(fast(x), model(x))
            if counter.frame_count > before:
                site = moepass.last_plan().sites[0]
                plans[str(site.tokens)] = site.lowering
                assert T in site.tokens
    assert counter.frame_count == len(plans) <= 3
    assert len(set(plans.values())) == len(plans) > 1, plans


@pytest.mark.parametrize("T", [0, 1, 2])
def test_few_tokens_are_right(T):
    model, x = Net(1), torch.randn(T, D)
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-5, atol=1e-6)
