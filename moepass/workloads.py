"""From a recognised site to what the planner asks of it: a ``Workload``, and T as the graph has it, symbol or number.

Nothing here compares T, so no guard is installed.  Sites come from a graph with example values.
"""

from __future__ import annotations

import math

import torch

from moepass import _compat, errors, pointwise
from moepass.graph import values
from moepass.graph.foreign.site import ForeignExperts
from moepass.graph.semantic import SemanticExperts
from moepass.graph.site import DenseFFN
from moepass.lowering.plan import Workload
from moepass.ops import autocast_is_on
from moepass.spec import MoESpec

Size = int | torch.SymInt


def dense(site: DenseFFN, spec: MoESpec, *, train: bool) -> tuple[Workload, Size]:
    """What a dense block is to be made into by a complete ``spec``."""
    x, y = values.tensor(site.x), values.tensor(site.output)
    if x is None or y is None:
        raise errors.MoepassError(detail="the graph carries no example values")
    size: Size = math.prod(x.shape[:-1])
    work = Workload(
        tokens=_compat.size_hint(size) or 0,
        D=site.D,
        F=spec.experts.intermediate_size or site.F,
        E=spec.experts.num_experts,
        K=spec.router.top_k,
        n=site.n,
        dtype=_dtype(y.dtype),
        device=y.device.type,
        train=train,
        bias=spec.experts.bias_in or spec.experts.bias_out,
        dropout=site.dropout > 0.0,
        activation_flops=pointwise.flops_per_element(site.program),
        capacity_factor=spec.dispatch.capacity_factor,
    )
    return work, size


def semantic(site: SemanticExperts, *, train: bool) -> tuple[Workload, Size]:
    """What a semantic node asks for, and its T as the graph has it; on several ranks, what this one holds of it."""
    w_in, size = site.tensor("w_in"), site.tensor("x_TD").shape[0]
    activation = site.operands["activation"]
    n = pointwise.n_inputs(activation)
    work = Workload(
        tokens=_compat.size_hint(size) or 0,
        D=int(w_in.shape[2]),
        F=int(w_in.shape[1]) // n,
        E=int(w_in.shape[0]),
        K=int(site.tensor("index_TK").shape[1]),
        n=n,
        dtype=_dtype(site.dtype),
        device=w_in.device.type,
        train=train,
        bias=site.operands["b_in"] is not None or site.operands["b_out"] is not None,
        dropout=site.operands["dropout"] > 0.0,
        activation_flops=pointwise.flops_per_element(activation),
        capacity_factor=site.operands["capacity_factor"] or None,
        shared=site.shared,
    )
    return work, size


def foreign(site: ForeignExperts, *, train: bool) -> tuple[Workload, Size]:
    """What experts do that other code spelled out."""
    x, y = values.tensor(site.x), values.tensor(site.down.node)
    if x is None or y is None:
        raise errors.MoepassError(detail="the graph carries no example values")
    size: Size = math.prod(x.shape[:-1])
    K = site.K
    device = y.device.type
    if site.weight_on_input:  # each choice of a token is a row of its own
        size, K = size * K, 1
    work = Workload(
        tokens=_compat.size_hint(size) or 0,
        D=site.down.stack.fan_out,
        F=site.down.stack.fan_in,
        E=site.down.stack.experts,
        K=K,
        n=pointwise.n_inputs(site.activation),
        dtype=_dtype(torch.get_autocast_dtype(device) if autocast_is_on(device) else y.dtype),
        device=device,
        train=train,
        bias=site.down.bias is not None or site.ups[0].bias is not None,
        dropout=site.dropout > 0.0,
        activation_flops=pointwise.flops_per_element(site.activation),
    )
    return work, size


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
