"""Gradients of a model whose parameters are placed differently: their mean over ranks, and their norm.

Contract
    ``average_gradients``  stands in for DDP: the mean over the ranks of whatever neither EP nor FSDP has reduced
    ``clip_grad_norm_``    as ``torch.nn.utils.clip_grad_norm_``, which does not take plain and sharded gradients at
                           once: one norm over all ranks' parts, each counted once
    Collective: every rank of the mesh calls them.  A parameter without a gradient counts as zero, and gets one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


@torch.no_grad()
def average_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """All-reduce gradients over the dimensions of ``mesh`` that nothing has reduced yet, and divide by the ranks.

    Plain parameters: over all dimensions.  Experts, and what FSDP2 shards: over those that their own mesh leaves out.
    Call it once for a step, after the last backward; not for models wrapped in DDP.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        done = set(parameter.device_mesh.mesh.flatten().tolist()) if isinstance(parameter, DTensor) else set()
        grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        for name in mesh.mesh_dim_names or ():
            group = mesh.get_group(name)
            # By its ranks, not by its name: FSDP2 has a mesh of its own, flattened out of several dimensions.
            if not done.issuperset(dist.get_process_group_ranks(group)):
                dist.all_reduce(grad, group=group)
                grad /= group.size()


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale all gradients by ``min(1, max_norm / norm)``; returns the norm, 0-dim, the same on every rank.

    Finite norm types of at least 1, and infinity.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(gradients, norm_type)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(scale.to(local.device, local.dtype))
    return norm


def total_norm(gradients: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients together, float32 (float64 for float64)."""
    largest = norm_type == torch.inf
    parts: dict[tuple[DeviceMesh, tuple[int, ...]] | None, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        wide = local.to(torch.promote_types(local.dtype, torch.float32))
        if wide.numel():
            value = wide.abs().max() if largest else wide.abs().pow(norm_type).sum()
        else:
            value = wide.new_zeros(())
        parts[_shared_out(gradient)].append(value)
    totals = []
    for where, values in parts.items():
        total = torch.stack(values)
        total = total.max() if largest else total.sum()
        if where is not None:
            mesh, dims = where
            for d in dims:
                dist.all_reduce(total, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=mesh.get_group(d))
        totals.append(total)
    if not totals:
        return torch.zeros(())
    whole = torch.stack([t.to(totals[0]) for t in totals])
    return whole.max() if largest else whole.sum().pow(1.0 / norm_type)


def _shared_out(gradient: Tensor) -> tuple[DeviceMesh, tuple[int, ...]] | None:
    """The mesh dimensions over which a gradient is cut to pieces."""
    if not isinstance(gradient, DTensor):
        return None
    dims = tuple(d for d, placement in enumerate(gradient.placements) if not placement.is_replicate())
    return (gradient.device_mesh, dims) if dims else None
