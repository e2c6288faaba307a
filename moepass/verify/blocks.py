"""Blocks of ours (``nn.MoE``) one by one, in float64 and eagerly: what a whole model would hide.

    reference           output and all gradients against ``reference.moe`` and the losses' definitions, with a mask over
                        tokens that hold NaN
    finite differences  the gradient along a random direction of each parameter, against differences of the block's own
                        output: nothing of ours but the forward takes part
    losses              what an attached loss alone does to the router
    recompute           gradients and recorded metrics when activation checkpointing runs the forward again
The router is drawn anew, so that no two experts tie: ties make the function jump where it is differentiated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moepass.nn.moe import MoE
from moepass.verify.compare import TOLERANCES, cotangents, equal_bits, mismatch, worst_gradient, worst_output
from moepass.verify.oracle import (
    block_losses,
    moe_blocks,
    random_always,
    random_in_training,
    reference_forward,
)
from moepass.verify.report import Check, guarded

#: Sequences and tokens of the inputs; a multiple of most sub-sequence lengths.
_SHAPE = (2, 16)
_STEP = 1e-6
#: Differences of a step of 1e-6 in float64: truncation and rounding together.
_DIFFERENCE_TOLERANCE = 1e-5


def check_blocks(model: nn.Module, *, train: bool) -> Iterator[Check]:
    """Checks of each distinct block; blocks of equal width and spec are checked once."""
    seen: dict[tuple[Any, ...], str] = {}
    for name, block in moe_blocks(model).items():
        key = (block.D, block.spec, tuple(n for n, _ in block.named_parameters()))
        if key not in seen:
            seen[key] = name
            subject = name or "the block"
            yield from guarded(subject, "block", lambda block=block, s=subject: _check(s, block, train))  # type: ignore[misc]


def _check(subject: str, original: MoE, train: bool) -> Iterator[Check]:
    if random_always(original.spec):
        yield Check.skipped(subject, "block", f"assignment={original.spec.router.assignment!r} draws its experts")
        return
    block = _probe(original)
    x, mask = _inputs(block)
    yield from _against_reference(subject, block, x, mask)
    yield _finite_differences(subject, block, x[:1])
    if train:
        yield from _losses_alone(subject, block, x)
        yield from _recompute(subject, block, x)


def _probe(original: MoE) -> MoE:
    """A float64 copy with another router, in training mode where that is not random."""
    block = copy.deepcopy(original).to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in block.router.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * p.shape[-1] ** -0.5)
        for p in block.parameters():
            p.requires_grad_(True)
    block.router.tape = None
    block.record_metrics(False)
    return block.train(not random_in_training(block.spec))


def _inputs(block: MoE) -> tuple[Tensor, Tensor]:
    """``x [B, S, D]`` and its mask ``[B, S]``; masked tokens are NaN where the block promises not to look at them."""
    B, S = _SHAPE
    S = math.lcm(S, block.spec.dispatch.subsequence_length or 1)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(B, S, block.D, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, S, generator=generator) < 0.8
    if block.shared_in is None and block.latent_in is None:  # those run on every token
        x = torch.where(mask.unsqueeze(-1), x, math.nan)
    return x, mask


def _against_reference(subject: str, block: MoE, x: Tensor, mask: Tensor) -> Iterator[Check]:
    named = dict(block.named_parameters())
    ours_x, theirs_x = (x.clone().requires_grad_() for _ in range(2))
    losses: list[Tensor] = []
    ours, theirs = block(ours_x, mask), reference_forward(block, losses, theirs_x, mask)
    real = mask.unsqueeze(-1).expand_as(ours)
    wrong = worst_output([ours[real]], [theirs[real]])
    tolerance = TOLERANCES[torch.float64]
    yield Check.within(subject, "reference: output", wrong.error, tolerance.outputs, "the output")
    (weights,) = cotangents([ours])
    grads = [
        torch.autograd.grad((y[real] * weights[real]).sum() + sum(extra), [given, *named.values()], allow_unused=True)
        for y, extra, given in ((ours, [], ours_x), (theirs, losses, theirs_x))
    ]
    (x_ours, *ours_p), (x_theirs, *theirs_p) = grads
    gradient = worst_gradient(
        {"x": _where(mask, x_ours), **dict(zip(named, ours_p, strict=True))},
        {"x": _where(mask, x_theirs), **dict(zip(named, theirs_p, strict=True))},
    )
    yield Check.within(subject, "reference: gradients", gradient.error, tolerance.gradients, gradient.where)


def _where(mask: Tensor, gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient[mask]


def _finite_differences(subject: str, block: MoE, x: Tensor) -> Check:
    """Along one random direction for x and each parameter; attached losses are no part of the output, so off."""
    x = x.nan_to_num(nan=0.5).detach()
    training = block.training
    block.eval()
    try:
        named: dict[str, Tensor] = {"x": x.requires_grad_(), **dict(block.named_parameters())}
        (weights,) = cotangents([block(x)])
        grads = torch.autograd.grad((block(x) * weights).sum(), list(named.values()), allow_unused=True)
        worst, where = 0.0, ""
        slopes = [_slope(block, x, tensor, weights) for tensor in named.values()]
        floor = 1e-3 * max(abs(float(s)) for s, _ in slopes)
        for name, grad, (measured, direction) in zip(named, grads, slopes, strict=True):
            analytic = torch.zeros(()) if grad is None else (grad * direction).sum()
            error = mismatch(analytic, measured, floor)
            if error > worst:
                worst, where = error, f"gradient of {name}"
    finally:
        block.train(training)
    return Check.within(subject, "finite differences", worst, _DIFFERENCE_TOLERANCE, where)


def _slope(block: MoE, x: Tensor, tensor: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The measured derivative of the objective along a random unit direction of ``tensor``, and the direction."""
    generator = torch.Generator().manual_seed(8)
    direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    direction = direction / direction.norm()
    values = []
    with torch.no_grad():
        kept = tensor.clone()
        for sign in (1.0, -1.0):
            tensor.copy_(kept + sign * _STEP * direction)
            values.append((block(x) * weights).sum())
        tensor.copy_(kept)
    return (values[0] - values[1]) / (2 * _STEP), direction


def _losses_alone(subject: str, block: MoE, x: Tensor) -> Iterator[Check]:
    """The gradient that attached losses give the router when the output itself has none."""
    spec = block.spec.losses
    if not spec.active or not spec.attach:
        yield Check.skipped(subject, "attached losses", "the spec attaches none")
        return
    if not block.training:
        yield Check.skipped(subject, "attached losses", "the block is random in training mode")
        return
    x = x.nan_to_num(nan=0.5).detach()
    router = block.router
    (ours,) = torch.autograd.grad((block(x) * 0.0).sum(), [router.weight], allow_unused=True)
    x_TD, bias = x.reshape(-1, block.D), router.linear_bias
    logits_TE = F.linear(x_TD, router.weight, bias)
    found = block_losses(block, logits_TE, None, (x.shape[0], x.shape[1]))
    (theirs,) = torch.autograd.grad(torch.stack(list(found.values())).sum(), [router.weight], allow_unused=True)
    error = mismatch(ours, theirs)
    tolerance = TOLERANCES[torch.float64].gradients
    yield Check.within(subject, "attached losses", error, tolerance, f"{', '.join(found)} on the router's weight")


def _recompute(subject: str, block: MoE, x: Tensor) -> Iterator[Check]:
    x = x.nan_to_num(nan=0.5).detach().requires_grad_()
    parameters = list(block.parameters())

    def backward(y: Tensor) -> list[Tensor | None]:
        (weights,) = cotangents([y])
        return list(torch.autograd.grad((y * weights).sum(), [x, *parameters], allow_unused=True))

    block.record_metrics(True)
    plain = backward(block(x))
    wanted = block.metrics()
    again = backward(checkpoint(block, x, use_reentrant=False))
    counted = block.metrics()
    block.record_metrics(False)
    same = equal_bits(again, plain)
    yield Check.holds(subject, "recompute: gradients", same, "other bits than without checkpointing")
    wrong = [name for name, a, b in zip(wanted._fields, counted, wanted, strict=True) if not torch.equal(a, b)]
    routed = block.spec.router.choice == "token"
    total = x.shape[0] * x.shape[1] * block.spec.router.top_k
    if not wrong and routed and int(counted.tokens_per_expert.sum()) != total:
        wrong = [f"tokens_per_expert, which add up to {int(counted.tokens_per_expert.sum())} instead of {total}"]
    yield Check.holds(subject, "recompute: metrics", not wrong, f"metrics changed by the second forward: {wrong}")
