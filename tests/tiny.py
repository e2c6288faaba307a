"""A small net of gated feed-forward blocks and the helpers of the backend's tests."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moepass

D, WIDTH = 32, 64


class FFN(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, WIDTH, bias=False), nn.Linear(D, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, D, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x):
        return self.down(self.dropout(F.silu(self.gate(x)) * self.up(x)))


class Net(nn.Module):
    def __init__(self, layers: int = 2, **kwargs) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FFN(**kwargs) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (D,)))
        return x


def compiled(model, inner="aot_eager", *, dynamic=None, fullgraph=True, **options):
    return torch.compile(
        model, backend="moepass", fullgraph=fullgraph, dynamic=dynamic, options={"inner": inner, **options}
    )


def assert_close(actual, expected, tolerance=5e-6):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def gradients(parameters):
    return [p.grad for p in parameters]


def statuses():
    """``(status, reason)`` of every site of the last compile."""
    return [(site.status, site.reason) for site in moepass.last_plan().sites]


@pytest.fixture(autouse=True)
def fresh():
    """For test files that import it: every test starts without compiled code and with the same seed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
