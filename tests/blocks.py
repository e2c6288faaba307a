"""Hand-written feed-forward modules for the tests of conversion: each sits differently in its forward."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from moepass.upcycle.convert import convert

D, WIDTH = 16, 32


class Gated(nn.Module):
    """The whole forward is the block."""

    def __init__(self, bias=False):
        super().__init__()
        self.gate, self.up = nn.Linear(D, WIDTH, bias), nn.Linear(D, WIDTH, bias)
        self.down = nn.Linear(WIDTH, D, bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Spliced(Gated):
    """A dropout follows a gated block, in the same forward."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(super().forward(x))


class FunctionalDropout(Gated):
    """As Spliced, by a function that reads the training flag: torch.fx would freeze it."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, training=self.training)


class TakesTwo(Gated):
    """A second argument: no MoE can stand in for the module, but its forward can be rewritten."""

    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Raw(nn.Module):
    """Parameters of its own, stored [in, out]."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(D, WIDTH)), nn.Parameter(torch.randn(WIDTH, D))

    def forward(self, x):
        return torch.relu(x @ self.a) @ self.b


def chain(*between, bias=True):
    return nn.Sequential(
        nn.LayerNorm(D), nn.Linear(D, WIDTH, bias), *between, nn.Linear(WIDTH, D, bias), nn.Dropout(0.1)
    )


class Stack(nn.Module):
    """Residual blocks around given feed-forward modules, and a head."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(D, 5)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def converted(model, **options):
    """(report, largest relative change of the output in evaluation mode)."""
    x = torch.randn(4, 7, D, generator=torch.Generator().manual_seed(3)).to(next(model.parameters()).dtype)
    flags = [m.training for m in model.modules()]
    before = copy.deepcopy(model).eval()(x)
    assert [m.training for m in model.modules()] == flags
    report = convert(model, **options)
    after = copy.deepcopy(model).eval()(x)
    return report, float(((after - before).abs().max() / before.abs().max()).detach())
