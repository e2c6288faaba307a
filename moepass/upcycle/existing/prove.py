"""Comparing two modules by numbers: values and gradients on random probes, in float64 copies.

Copies are float32 where a block cannot run in float64 (``F.grouped_mm``).
Modules that compute a part in float32 whatever they are given (a router's softmax, say) cannot agree to float64's last
digits; ``ROUNDED`` is for them.  Both bounds are far below what two different routing rules differ by.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Relative bounds: float64 throughout, or float32 somewhere inside.
EXACT, ROUNDED = 1e-9, 1e-5


def wide_copy(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy in float64 (or ``dtype``) and evaluation mode whose floating parameters all take gradients."""
    copied = copy.deepcopy(module).to(dtype).eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return copied


def probe(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    """Standard normal in the dtype and on the device of ``like``, which takes gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype).requires_grad_()


@torch.enable_grad()
def observe(module: nn.Module, args: Sequence[Any], wrt: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """All floating outputs, then the gradients with respect to ``wrt`` of a fixed weighted sum of the outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # A clone: what works on its input in place would change the probe for the one that comes after.
        outputs = tensors(module(*(a.clone() if isinstance(a, Tensor) else a for a in args)))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.numel(), generator=generator, dtype=torch.float64).to(y.device) for y in outputs]
    total = torch.stack([(y.double().reshape(-1) * w).sum() for y, w in zip(outputs, weights, strict=True)]).sum()
    grads = torch.autograd.grad(total, list(wrt), allow_unused=True, materialize_grads=True)
    return (*(y.detach() for y in outputs), *grads)


def mismatch(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest value, over pairs of tensors; infinite where they do not pair."""
    if len(ours) != len(theirs):
        return math.inf
    return max((relative(a, b) for a, b in zip(ours, theirs, strict=True)), default=math.inf)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of ``b``; infinite for other shapes and for NaN."""
    if a.shape != b.shape:
        return math.inf
    if not a.numel():
        return 0.0
    a, b = a.detach(), b.detach()
    difference, scale = float((a - b).abs().max()), float(b.abs().max())
    return math.inf if math.isnan(difference) else difference / max(scale, 1e-30)


def tensors(out: object) -> list[Tensor]:
    """The floating tensors of a forward's result, in order."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    items = out.values() if isinstance(out, Mapping) else out if isinstance(out, list | tuple) else ()
    return [t for item in items for t in tensors(item)]
