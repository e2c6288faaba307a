"""``moepass.parallel.load``: a model in moepass's own format straight onto its ranks, whole on none of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moepass import errors
from moepass.nn.moe import MoE
from moepass.parallel.placement import own_range, parallelize
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.modules import set_tensor_at, tensor_at
from moepass.upcycle.own.load import check_tensors, skeleton
from moepass.upcycle.own.schema import STEM
from moepass.upcycle.own.skeleton import tied_names


def load(folder: str | os.PathLike[str], mesh: DeviceMesh, ep: Any = "ep", **options: Any) -> nn.Module:
    """The model that ``moepass.save`` or ``moepass upcycle --to moepass`` wrote, parallelized; in evaluation mode.

    ``ep`` and ``options``: those of ``moepass.parallelize`` but ``fsdp``.  Each rank reads the rows of its own experts
    and nothing of the others' (with ``tp`` a weight is cut after it is read): no rank ever holds the whole model.  With
    ``moepass upcycle --to moepass``, which streams, a dense checkpoint reaches its ranks without being whole anywhere.
    Raises as ``moepass.load`` and ``parallelize``.
    """
    if options.get("fsdp") is not None:
        detail = "weights are read into experts that FSDP has not cut yet; apply fully_shard afterwards"
        raise errors.BadOption(name="fsdp", value=options["fsdp"], detail=detail)
    root = Path(folder)
    model = skeleton(root, mesh.device_type)
    source = Source.open(root, stem=STEM)
    groups = tied_names(model)
    check_tensors(model, groups, source.headers, root)
    parallelize(model, mesh, ep, **options)
    for names in groups:
        old = tensor_at(model, names[0])
        new = _read(source, next(name for name in names if name in source.headers), old, mesh.device_type)
        for name in names:
            set_tensor_at(model, name, new)
    for module in model.modules():
        if isinstance(module, MoE):
            module.router.materialise()  # token counts, which no file holds
    return model


@torch.no_grad()
def _read(source: Source, name: str, old: Tensor, device: str) -> Tensor:
    """What is to stand in the place of a tensor on the meta device."""
    if isinstance(old, DTensor):
        local = _own(source, name, old).to(device)
        new: Tensor = DTensor.from_local(local, old.device_mesh, old.placements, run_check=False)
    else:
        new = source.read(name).to(device)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _own(source: Source, name: str, old: DTensor) -> Tensor:
    """This rank's experts, and of those its part of F: rows of one expert after another are read, then cut."""
    ranges = [own_range(size, d, old.device_mesh, old.placements) for d, size in enumerate(old.shape)]
    (begin, end), *inner = ranges
    part = source.read(name, begin, end).view(end - begin, *old.shape[1:])
    for d, (low, high) in enumerate(inner, 1):
        part = part.narrow(d, low, high - low)
    return part.contiguous()
