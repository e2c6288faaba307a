"""The default body of ``moepass::experts``: what runs when no moepass backend has chosen a lowering.

Contract
    eager call        the planner chooses, by a workload whose T is rounded up to a power of two (so choices are cached)
    being traced      (plain Inductor, torch.export's decompositions): ``grouped``, or ``capacity`` where the spec
                      drops; no comparison on T, hence no guard
    under autocast    floating operands are cast to the autocast dtype, as autocast does for linear
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from moepass import pointwise
from moepass.kernels.fused.launch import power_of_two
from moepass.lowering.base import ExpertArgs
from moepass.lowering.plan import Workload
from moepass.ops import autocast_is_on

#: ``Lowering.build``.
Build = Callable[[Tensor, Tensor, Tensor, ExpertArgs], Tensor]


def run(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
    """Compute the experts by a sound choice of lowering."""
    return run_lowering(_choice(x_TD, index_TK, weight_TK, args), x_TD, index_TK, weight_TK, args)


def run_lowering(name: str, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
    """Compute the experts by the named lowering, in the autocast dtype where autocast is on."""
    from moepass.lowering.registry import lowerings

    return in_compute_dtype(lowerings()[name].build, x_TD, index_TK, weight_TK, args)


def run_part(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
    """What one rank's experts add to the sum; most pairs may be of nobody, and K may exceed the rank's E."""
    from moepass.lowering.registry import lowerings

    return lowerings()["grouped"].build(x_TD, index_TK, weight_TK, replace(args, capacity_factor=0.0))


def in_compute_dtype(build: Build, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
    """``build(...)``, in the autocast dtype where autocast is on."""
    device = x_TD.device.type
    if not autocast_is_on(device):
        return build(x_TD, index_TK, weight_TK, args)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return build(_cast(x_TD, dtype), index_TK, weight_TK, _cast_args(args, dtype))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(_cast_dtype(x, dtype))


def _cast_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or x's own where autocast leaves it alone."""
    return dtype if x.is_floating_point() and x.dtype != torch.float64 else x.dtype


def _cast_args(args: ExpertArgs, dtype: torch.dtype) -> ExpertArgs:
    return replace(
        args,
        w_in=_cast(args.w_in, dtype),
        w_out=_cast(args.w_out, dtype),
        b_in=None if args.b_in is None else _cast(args.b_in, dtype),
        b_out=None if args.b_out is None else _cast(args.b_out, dtype),
    )


def _choice(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> str:
    if args.capacity_factor:
        return "capacity"
    if type(x_TD) not in (Tensor, nn.Parameter):  # fake, functional or another subclass: being traced
        return "grouped"
    from moepass.lowering.hardware import load_hardware
    from moepass.lowering.planner import choose

    tokens = power_of_two(x_TD.shape[0])
    leaves = (x_TD, weight_TK, args.w_in, args.w_out, args.b_in, args.b_out)
    train = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    work = workload(tokens, x_TD, index_TK.shape[1], args, train=train)
    return choose(work, load_hardware(None, x_TD.device.type))


def workload(tokens: int, x_TD: Tensor, K: int, args: ExpertArgs, *, train: bool) -> Workload:
    """The planner's view of one call, in the dtype that ``in_compute_dtype`` computes it in."""
    E, rows, D = args.w_in.shape
    device = x_TD.device.type
    dtype = _cast_dtype(x_TD, torch.get_autocast_dtype(device)) if autocast_is_on(device) else x_TD.dtype
    n = pointwise.n_inputs(args.activation)
    return Workload(
        tokens=tokens,
        D=D,
        F=rows // n,
        E=E,
        K=K,
        n=n,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        train=train,
        bias=args.b_in is not None or args.b_out is not None,
        dropout=args.dropout > 0.0,
        activation_flops=pointwise.flops_per_element(args.activation),
        capacity_factor=args.capacity_factor or None,
    )
