"""Weights that the backend cannot take: each compiles as it is, with a reason, and raises under strict=True."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import WIDTH, D, compiled, fresh, statuses  # noqa: F401 -- fresh is a fixture
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import moepass


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, WIDTH, bias=False), nn.Linear(WIDTH, D, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


class Weights(nn.Module):
    """``relu(x W1') W2'`` with weights of any kind."""

    def __init__(self, up, down) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.up)), self.down)


def frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


def subclass():
    weights = [torch.randn(WIDTH, D), torch.randn(D, WIDTH)]
    return Weights(*(frozen(TwoTensor(w, w.clone())) for w in weights)), torch.randn(8, D)


def integers():
    up, down = torch.randint(-3, 3, (WIDTH, D)), torch.randint(-3, 3, (D, WIDTH))
    return Weights(frozen(up), frozen(down)), torch.randint(-3, 3, (8, D))


def buffers():
    model = Weights(None, None)
    for name, shape in (("up", (WIDTH, D)), ("down", (D, WIDTH))):
        delattr(model, name)
        model.register_buffer(name, torch.randn(shape))
    return model, torch.randn(8, D)


class Int8Linear(nn.Module):
    """Weight-only quantisation as torchao writes it out: int8 buffer and scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("data", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.data.to(x.dtype) * self.scale)


def int8():
    model = FFN()
    model.up, model.down = Int8Linear(model.up), Int8Linear(model.down)
    return model, torch.randn(8, D)


class Normed(nn.Module):
    """A weight that the graph computes from a parameter."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(rows, columns))

    def forward(self, x):
        return F.linear(x, F.normalize(self.direction, dim=1))


def computed():
    model = FFN()
    model.up, model.down = Normed(WIDTH, D), Normed(D, WIDTH)
    return model, torch.randn(8, D)


def parametrised():
    model = FFN()
    nn.utils.parametrizations.weight_norm(model.down)
    return model, torch.randn(8, D)


REFUSED = {
    "subclass": (subclass, "tensor_subclass"),
    "integers": (integers, "non_floating"),
    "buffers": (buffers, "weight_not_parameter"),
    "int8": (int8, "weight_not_parameter"),
    "computed": (computed, "weight_not_parameter"),
    "parametrised": (parametrised, "weight_not_parameter"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_weights_that_cannot_be_taken_stay_as_they_are_with_a_reason(kind):
    make, reason = REFUSED[kind]
    model, x = make()
    expected = model(x)
    torch.testing.assert_close(compiled(model, fullgraph=False)(x), expected)
    assert statuses() == [("skipped", reason)]
    assert moepass.last_plan().sites[0].hint


@pytest.mark.parametrize("kind", REFUSED)
def test_strict_refuses_weights_that_cannot_be_taken(kind):
    make, reason = REFUSED[kind]
    model, x = make()
    with pytest.raises(Exception, match=f"{reason} .*use strict=False to leave it dense"):
        compiled(model, strict=True)(x)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_sparse_weights_compute_as_before(layout):
    """Dynamo does not trace sparse tensors, so that none reaches the backend (graph/test_rejections.py)."""
    up, down = (torch.randn(shape).to_sparse(layout=layout) for shape in ((WIDTH, D), (D, WIDTH)))
    model, x = Weights(frozen(up), frozen(down)), torch.randn(8, D)
    torch.testing.assert_close(compiled(model, fullgraph=False)(x), model(x))


def test_dynamically_quantised_modules_still_compile():
    model, x = FFN(), torch.randn(8, D)
    if "onednn" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "onednn"
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    torch.testing.assert_close(compiled(quantised, "eager", fullgraph=False)(x), quantised(x))
