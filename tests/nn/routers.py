"""Routers with decisive logits and fixed draws, for the tests of routing."""

from __future__ import annotations

import torch

from moepass.nn import Router

T, D, E, K = 33, 6, 8, 4


def router_of(spec, seed=0, dtype=torch.float64, **options):
    router = Router(D, E, spec, dtype=dtype, **options)
    router.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        router.weight.mul_(20.0)  # decisive logits
        for vector in (router.bias, router.linear_bias):
            if vector is not None:
                vector.copy_(torch.randn(E, generator=torch.Generator().manual_seed(seed + 1)) / 5)
    return router


def tokens(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
