"""The way to a launch reads no value from the device, so a CUDA graph can capture it: tried on tensors without values.

Meta tensors refuse ``.item()``, ``nonzero`` and every other result whose size or value depends on data.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moepass.kernels.fused import ops, runner
from moepass.kernels.fused.problem import TARGETS
from moepass.lowering.base import ExpertArgs
from moepass.lowering.fused import Fused
from moepass.lowering.inline import lowered_op

D, F, E, K = 64, 32, 8, 2
#: What may happen between launches: memory is allocated, tensors are looked at in another shape.
HARMLESS = {"empty", "empty_strided", "new_empty", "view", "_unsafe_view", "reshape", "alias", "detach"}


@pytest.fixture
def launched(monkeypatch):
    """Launches on tensors without values: (kernel, grid), in order."""
    made: list[tuple[str, int]] = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            assert all(type(size) is int for size in grid)
            return lambda **_: made.append((self.name, grid[0]))

    def refuse(*_, **__):
        raise AssertionError("the host waits for the device")

    monkeypatch.setattr(runner, "function", Kernel)
    monkeypatch.setattr(runner, "target", lambda _: TARGETS["sm_90"])
    monkeypatch.setattr(runner, "available", lambda _: True)
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "synchronize", refuse)
    ops.reload_tiles()
    yield made
    ops.reload_tiles()


class Seen(TorchDispatchMode):
    """Names of the aten ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operands(T: int, **options) -> list[torch.Tensor]:
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta", **options)

    index = torch.empty(T, K, dtype=torch.int64, device="meta")
    weights = (empty(E, 2 * F, D), empty(E, D, F), empty(E, 2 * F), empty(E, D))
    return [empty(T, D), index, empty(T, K, dtype=torch.float32), *weights]


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("T", [1, 64, 4096])
def test_a_pass_is_launched_without_reading_a_value(T, save, launched):
    given = operands(T)
    with Seen() as seen:
        y, z = ops._forward(*given, "silu(g)*u", False, save)
        gradients = ops._backward(torch.empty_like(y), *given, z, "silu(g)*u", False, [True] * 6)
    assert seen.names <= HARMLESS | {"empty_like"}
    assert [g.shape for g in gradients] == [t.shape for i, t in enumerate(given) if i != 1]
    assert {"weights.outer_gradient", "combine.combine"} <= {name for name, _ in launched}
    assert ("decode.stream_up" in {name for name, _ in launched}) == (T == 1 and not save)
    assert all(count > 0 for _, count in launched)


def test_the_lowering_differentiates_without_reading_a_value(launched):
    x, index, weight, *weights = operands(64, requires_grad=True)
    score = torch.empty(64, E, device="meta").topk(K)
    y = Fused().build(x, score.indices, weight, ExpertArgs(*weights, "silu(g)*u"))
    gradients = torch.autograd.grad(y, [x, weight, *weights], torch.empty_like(y))
    assert all(g.device.type == "meta" for g in gradients)
    assert index.shape == score.indices.shape


def test_the_experts_ops_take_what_their_bodies_expect_in_that_order():
    def names(op):
        return [a.name for a in getattr(op, "default", op)._schema.arguments]

    fields = ["x_TD", "index_TK", "weight_TK", *(f.name for f in dataclasses.fields(ExpertArgs))]
    assert names(torch.ops.moepass.experts) == fields
    assert names(lowered_op("fused")) == fields
    assert names(torch.ops.moepass.experts_ep)[: len(fields)] == fields
    assert names(torch.ops.moepass.fused_experts)[:7] == list(ops.Operands._fields)
    assert names(torch.ops.moepass.fused_experts_backward)[1:8] == list(ops.Operands._fields)
