"""Are the sides right?  Outputs and gradients against ``moepass.reference`` in float64, before anything is timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu import clock
from benchmarks.gpu.cells import Cell, Shape, leaves, route, tokens_and_scores, weights
from benchmarks.gpu.sides import Bench, Side
from moepass import reference

#: Largest relative error (2-norm) that a side may have: roundings of inputs, hidden values and outputs.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
#: Experts of the checked block at most: float64 weights of 256 would not fit.
_EXPERTS = 16


def small(shape: Shape) -> Shape:
    """The same widths with few experts."""
    return replace(shape, E=min(shape.E, _EXPERTS), K=min(shape.K, _EXPERTS // 2))


def exact(cell: Cell, dtype: torch.dtype, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients of a random projection of it, in float64."""
    x_TD, score_TE = tokens_and_scores(cell, dtype, device)
    w_in, w_out = weights(cell.shape, dtype, device)
    given = {"x": x_TD, "score": score_TE, "w_in": w_in, "w_out": w_out}
    wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    held = reference.ExpertWeights(wide["w_in"], wide["w_out"], None, None)
    y_TD = reference.routed_experts(wide["x"], *route(wide["score"], cell.shape.K), held, "swiglu")
    grads = torch.autograd.grad(y_TD, list(wide.values()), _direction(y_TD))
    return y_TD.detach(), dict(zip(wide, grads, strict=True))


def relative_errors(
    bench: Bench, side: Side, cell: Cell, truth: tuple[Tensor, Mapping[str, Tensor]]
) -> dict[str, float]:
    """2-norm of the difference over that of the truth: ``y``, and each gradient where the cell trains."""
    dtype, device = bench.w_in.dtype, bench.w_in.device.type
    x_TD, score_TE = leaves(cell, dtype, device)
    if not cell.train:
        with torch.no_grad():
            return {"y": _error(side(x_TD, score_TE), truth[0])}
    y_TD = side(x_TD, score_TE)
    wanted = {"x": x_TD, "score": score_TE, "w_in": bench.w_in, "w_out": bench.w_out}
    grads = torch.autograd.grad(y_TD, list(wanted.values()), _direction(y_TD).to(y_TD.dtype))
    found = {name: _error(g, truth[1][name]) for name, g in zip(wanted, grads, strict=True)}
    return {"y": _error(y_TD.detach(), truth[0])} | found


def replay_error(side: Side, cell: Cell, dtype: torch.dtype, device: str) -> float | None:
    """How far a replayed CUDA graph is off an eager call, on tokens and routing that came after the capture.

    None: it could not be captured.  A launch that the host sized by the routing would show here.
    """
    given = x_TD, score_TE = tuple(t.detach().clone() for t in tokens_and_scores(cell, dtype, device))
    made: list[Tensor] = []
    with torch.no_grad():
        replay = clock.captured(lambda: made.append(side(*given)), device)
        if replay is None:
            return None
        x_TD.copy_(x_TD.flip(1))
        score_TE.copy_(score_TE.flip(1))  # the last experts are now the first
        replay()
        return _error(made[-1], side(*given).double())


def _direction(y_TD: Tensor) -> Tensor:
    """The same on both sides, exact in every dtype."""
    draw = torch.Generator(y_TD.device).manual_seed(2)
    return torch.randint(-2, 3, y_TD.shape, device=y_TD.device, generator=draw).to(y_TD.dtype)


def _error(found: Tensor, truth: Tensor) -> float:
    difference = (found.double() - truth).norm() / truth.norm().clamp_min(1e-30)
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")
