"""What can be said of a model and a mesh before any collective."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moepass import errors
from moepass.nn.metrics import WRAPPERS
from moepass.nn.moe import MoE
from moepass.spec import MoESpec

FORMS = ("auto", "replicated", "all_gather", "all_to_all", "hierarchical")


def blocks_of(model: nn.Module) -> dict[str, MoE]:
    """The MoE blocks of a model by name, each once."""
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): module
        for name, module in model.named_modules()
        if isinstance(module, MoE)
    }


def check(
    model: nn.Module, mesh: Any, dims: tuple[str, ...], fsdp: str | None, form: str, buffer_factor: float | None
) -> dict[str, MoE]:
    """The blocks that can be parallelized; raises where one cannot, or where the mesh is wrong."""
    _check_mesh(mesh, dims, fsdp, form, buffer_factor)
    found = blocks_of(model)
    if not found:
        raise errors.NotParallel(where=type(model).__name__, detail="it has no moepass.nn.MoE block",
                                 remedy="use moepass.convert first")  # fmt: skip
    P = math.prod(mesh.size(mesh.mesh_dim_names.index(dim)) for dim in dims)
    for name, block in found.items():
        _check_block(name or type(block).__name__, block, mesh, P, form)
    return found


def _check_mesh(mesh: Any, dims: tuple[str, ...], fsdp: str | None, form: str, buffer_factor: float | None) -> None:
    def refuse(detail: str, remedy: str) -> errors.BadMesh:
        return errors.BadMesh(mesh=mesh, detail=detail, remedy=remedy)

    if not isinstance(mesh, DeviceMesh) or not mesh.mesh_dim_names:
        raise refuse("it is not a DeviceMesh with named dimensions",
                     "make one with init_device_mesh(device, shape, mesh_dim_names=...)")  # fmt: skip
    for dim in (*dims, *([] if fsdp is None else [fsdp])):
        if dim not in mesh.mesh_dim_names:
            raise refuse(f"it has no dimension {dim!r}", f"choose among {', '.join(mesh.mesh_dim_names)}")
    if fsdp in dims or len(set(dims)) < len(dims):
        raise refuse("a dimension is named twice", "name different ones")
    if form not in FORMS:
        raise errors.BadOption(name="form", value=form, detail=f"the forms are {', '.join(FORMS)}")
    if len(dims) != (2 if form == "hierarchical" else 1):
        raise refuse(f"form={form!r} and ep={dims!r} do not go together",
                     "name two dimensions (nodes, ranks of a node) for 'hierarchical' and one otherwise")  # fmt: skip
    if buffer_factor is not None and (form != "all_to_all" or buffer_factor <= 0):
        detail = "a buffer belongs to form='all_to_all', and its factor is positive"
        raise errors.BadOption(name="buffer_factor", value=buffer_factor, detail=detail)


def _check_block(name: str, block: MoE, mesh: DeviceMesh, P: int, form: str) -> None:
    def refuse(detail: str, remedy: str) -> errors.NotParallel:
        return errors.NotParallel(where=name, detail=detail, remedy=remedy)

    E = block.spec.experts.num_experts
    if E % P:
        raise errors.NotDivisible(what="num_experts", value=E, by_what="the ranks of the mesh dimension", by=P,
                                  where=name, remedy="choose a mesh whose EP size divides it")  # fmt: skip
    if block.parallel is not None or isinstance(block.w_in, DTensor):
        raise refuse("its experts are sharded already", "call parallelize once, before DDP or FSDP")
    if not block.w_in.is_meta and block.w_in.device.type != mesh.device_type:
        raise errors.BadMesh(mesh=mesh, detail=f"it is of {mesh.device_type} devices, and {name} is on "
                             f"{block.w_in.device}", remedy="move the model first")  # fmt: skip
    if (why := _counted_before_the_op(block.spec, block.drops_before)) and form != "replicated" and P > 1:
        raise refuse(*why)
    if form == "hierarchical" and block.spec.dispatch.capacity_factor is not None and not block.drops_before:
        raise refuse("capacity over the batch counts rows in the order of the ranks, which two steps do not keep",
                     "use form='all_to_all', or DispatchSpec.scope='sequence'")  # fmt: skip


def _counted_before_the_op(spec: MoESpec, drops_before: bool) -> tuple[str, str] | None:
    """Why a rank's tokens alone would give another result than all tokens, if they would."""
    if spec.dispatch.scope != "batch" or spec.dispatch.capacity_factor is None:
        return None
    if spec.router.choice == "expert":
        return "its experts choose among the tokens of the whole batch", "use DispatchSpec.scope='sequence'"
    if drops_before and spec.dispatch.ragged_buffer_factor is None:
        detail = "its capacity is counted before the experts run, from this rank's tokens"
        return detail, "use drop_policy='position' and weight_on='output', or DispatchSpec.scope='sequence'"
    return None
