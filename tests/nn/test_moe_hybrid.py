"""The hybrid block: dense FFN and MoE side by side."""

from __future__ import annotations

import torch
from torch import nn

from moepass.nn import Hybrid, MoE
from moepass.spec import ExpertSpec, LossSpec, MoESpec

D = 6


def hybrid(norms=True):
    torch.manual_seed(0)
    spec = MoESpec(
        experts=ExpertSpec(num_experts=4, intermediate_size=5, activation="swiglu"), losses=LossSpec(z_weight=1.0)
    )
    dense = nn.Sequential(nn.Linear(D, 9), nn.GELU(), nn.Linear(9, D))
    sides = {"dense_norm": nn.LayerNorm(D), "moe_norm": nn.RMSNorm(D)} if norms else {}
    block = Hybrid(dense.double(), MoE(D, spec, dtype=torch.float64), **sides).double()
    return block.eval()


def test_output_and_gradients_are_the_sum_of_both_halves():
    for norms in (False, True):
        block = hybrid(norms)
        x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
        moe_in, dense_in = (block.moe_norm(x), block.dense_norm(x)) if norms else (x, x)
        expected = block.dense(dense_in) + block.moe(moe_in)
        y = block(x)
        torch.testing.assert_close(y, expected)
        tensors = [x, *block.parameters()]
        for grad, other in zip(
            torch.autograd.grad(y.square().sum(), tensors),
            torch.autograd.grad(expected.square().sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(grad, other)


def test_masks_and_losses_are_those_of_the_moe():
    block = hybrid().train()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    y, losses = block(x, mask, return_losses=True)
    torch.testing.assert_close(y[~mask], block.dense(block.dense_norm(x))[~mask])
    expected, expected_losses = block.moe(block.moe_norm(x), mask, return_losses=True)
    assert losses.keys() == expected_losses.keys() == {"z"}
    assert torch.equal(losses["z"], expected_losses["z"])
    torch.testing.assert_close(y, expected + block.dense(block.dense_norm(x)))


def test_compiles_in_one_graph():
    block = hybrid()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
