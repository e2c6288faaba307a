"""The definition of what an ``MoESpec`` means, in plain PyTorch: slow, readable, exact in float64.

Contract
    Every lowering, kernel, expert-parallel strategy and converted checkpoint is tested against ``moe``, forward and
    backward.  ``route`` is also the routing that models run; the rest is only ever the oracle.

Shapes: T tokens, D model width, F expert width, E experts, K top-k, n input projections.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moepass import pointwise
from moepass.spec import DispatchSpec, MoESpec, RouterSpec, capacity


class ExpertWeights(NamedTuple):
    """Expert parameters.  Rows are output features, as in nn.Linear; gate rows stand before up rows.

    ``w_in [E, n*F, D]``, ``w_out [E, D, F]``, ``b_in [E, n*F]`` or None, ``b_out [E, D]`` or None.
    """

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None = None
    b_out: Tensor | None = None


class Routing(NamedTuple):
    """Each token's experts and their weights, both ``[T, K]``, best first."""

    index_TK: Tensor
    weight_TK: Tensor


def route(logits_TE: Tensor, spec: RouterSpec) -> Routing:
    """Choose K experts a token (Shazeer et al. 2017; names as in HF and DeepSeek-V3).

    Computed in float32, or float64 if the logits are.  Ties go to the lower expert index, which keeps the virtual
    groups of an upcycled block whole; ``torch.topk`` promises no order among equals.
    """
    logits_TE = logits_TE.to(_wide(logits_TE.dtype))
    if spec.score_first:
        value_TK, index_TK = _stable_topk(_score(logits_TE, spec), spec.top_k)
    else:
        top_TK, index_TK = _stable_topk(logits_TE, spec.top_k)
        value_TK = _score(top_TK, spec)
    if spec.normalize == 1.0:  # scores are positive: the L1 norm is their sum
        value_TK = value_TK / value_TK.sum(-1, keepdim=True)
    elif spec.normalize is not None:
        value_TK = value_TK / torch.linalg.vector_norm(value_TK, ord=spec.normalize, dim=-1, keepdim=True)
    return Routing(index_TK, value_TK if spec.scale == 1.0 else value_TK * spec.scale)


def _stable_topk(scores_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    value_TE, index_TE = torch.sort(scores_TE, dim=-1, descending=True, stable=True)
    return value_TE[:, :top_k], index_TE[:, :top_k]


def _score(logits: Tensor, spec: RouterSpec) -> Tensor:
    return torch.softmax(logits, dim=-1) if spec.score == "softmax" else torch.sigmoid(logits)


def keep_mask(routing: Routing, num_experts: int, spec: DispatchSpec) -> Tensor:
    """Which of the ``[T, K]`` assignments are computed: all of them, or the first C of each expert in priority order.

    ``position``: tokens in order.  ``probability``: highest routing weight first; ties keep token order.
    """
    index_TK, weight_TK = routing
    if spec.capacity_factor is None:
        return torch.ones_like(index_TK, dtype=torch.bool)
    limit = capacity(spec.capacity_factor, index_TK.shape[0], index_TK.shape[1], num_experts)
    keep_R = torch.zeros(index_TK.numel(), dtype=torch.bool, device=index_TK.device)
    index_R, weight_R = index_TK.reshape(-1), weight_TK.reshape(-1)
    for expert in range(num_experts):
        rows = torch.nonzero(index_R == expert).squeeze(-1)
        if spec.drop_policy == "probability":
            rows = rows[torch.sort(weight_R[rows], descending=True, stable=True).indices]
        keep_R[rows[:limit]] = True
    return keep_R.view_as(index_TK)


def experts(x_TD: Tensor, routing: Routing, weights: ExpertWeights, spec: MoESpec) -> Tensor:
    """``y_t = sum_k weight[t,k] * expert_{index[t,k]}(x_t)`` over the assignments that are kept."""
    if spec.experts.activation is None:
        raise ValueError("the spec has no activation")
    kept_TK = keep_mask(routing, weights.w_in.shape[0], spec.dispatch)
    weight_TK = torch.where(kept_TK, routing.weight_TK, 0.0)
    out_TD = torch.zeros(x_TD.shape[0], weights.w_out.shape[1], dtype=_wide(x_TD.dtype), device=x_TD.device)
    for e in range(weights.w_in.shape[0]):
        gate_T = torch.where(routing.index_TK == e, weight_TK, 0.0).sum(-1)
        out_TD = out_TD + gate_T[:, None] * _expert(x_TD, weights, e, spec.experts.activation)
    return out_TD.to(x_TD.dtype)


def _expert(x_TD: Tensor, weights: ExpertWeights, e: int, activation: str) -> Tensor:
    h = F.linear(x_TD, weights.w_in[e], None if weights.b_in is None else weights.b_in[e])
    h = pointwise.apply(activation, h)
    y = F.linear(h, weights.w_out[e], None if weights.b_out is None else weights.b_out[e])
    return y.to(_wide(y.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    # Not torch.promote_types: torch.export would leave it in the graph as a node that Dynamo cannot read back.
    return torch.float64 if dtype == torch.float64 else torch.float32


def moe(x: Tensor, router_logits: Tensor, weights: ExpertWeights, spec: MoESpec) -> Tensor:
    """The MoE block: ``x [..., D]``, ``router_logits [..., E]`` -> ``[..., D]`` in x's dtype.

    Routing and the sum over experts run in float32 (float64 for float64 inputs).  Dropout is not applied: the
    reference defines the function in evaluation mode.
    """
    routing = route(router_logits.reshape(-1, router_logits.shape[-1]), spec.router)
    return experts(x.reshape(-1, x.shape[-1]), routing, weights, spec).reshape(x.shape)
