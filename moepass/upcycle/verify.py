"""Checking a conversion by numbers: the enclosing module before and after, on random tokens, float32, evaluation mode.

The output of the block itself is compared as well as the module's: a residual stream would hide the error of a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moepass.upcycle.exactness import rounds_nothing
from moepass.upcycle.modules import mode
from moepass.upcycle.trace import sample

#: Relative tolerances; a weight that had to be rounded to a narrow dtype after scaling gets that dtype's.
EXACT_TOLERANCE = 1e-4
ROUNDED_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}

TOKENS = 8


@dataclass(frozen=True)
class Probe:
    """Outputs of one run: of the whole module, and of the block where it is not the whole."""

    outputs: tuple[Tensor, ...]

    def mismatch(self, other: Probe) -> float:
        """Largest difference relative to the largest value, over the outputs; infinite where they do not compare."""
        if [t.shape for t in self.outputs] != [t.shape for t in other.outputs]:
            return math.inf
        return max((_relative(a, b) for a, b in zip(self.outputs, other.outputs, strict=True)), default=math.inf)


def _relative(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    scale, difference = float(a.abs().max()), float((a - b).abs().max())
    if math.isnan(difference):
        return math.inf
    return difference / scale if scale > 0.0 else difference


@torch.no_grad()
def run(module: nn.Module, tap: nn.Module | None, D: int | None, like: Tensor) -> Probe:
    """Run ``module`` on seeded random tokens ``[1, 8, D]`` (ids if D is None); ``tap``: whose output is taken too."""
    wide = torch.promote_types(like.dtype, torch.float32)
    state = {
        name: t.to(wide) if t.is_floating_point() else t
        for name, t in [*module.named_parameters(), *module.named_buffers()]
    }
    x = sample(D, TOKENS, like, wide)
    taken: list[Tensor] = []
    handle = None
    if tap is not None:
        handle = tap.register_forward_hook(lambda _m, _i, out: taken.append(out))
    try:
        with mode(module, training=False), torch.autocast(like.device.type, enabled=False):
            out = functional_call(module, state, (x,))
    finally:
        if handle is not None:
            handle.remove()
    return Probe(tuple(t for t in (*tensors(out), *taken) if t.is_floating_point()))


def tensors(out: object) -> list[Tensor]:
    """All tensors of a forward's result, in order."""
    if isinstance(out, Tensor):
        return [out]
    items = out.values() if isinstance(out, Mapping) else out if isinstance(out, list | tuple) else ()
    return [t for item in items for t in tensors(item)]


def tolerance(dtype: torch.dtype, *scales: float) -> float:
    """What a conversion may differ by whose weights were multiplied by these scales."""
    return EXACT_TOLERANCE if all(map(rounds_nothing, scales)) else ROUNDED_TOLERANCE.get(dtype, EXACT_TOLERANCE)
