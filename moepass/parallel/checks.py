"""What can be said of a model and a mesh before any collective."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moepass import errors
from moepass.lowering.forms import LOCAL
from moepass.nn.moe import MoE
from moepass.nn.named import named
from moepass.spec import MoESpec

FORMS = ("auto", "replicated", "all_gather", "all_to_all", "hierarchical")


def blocks_of(model: nn.Module) -> dict[str, MoE]:
    """The MoE blocks of a model by name, each once."""
    return dict(named(model, MoE))


@dataclass(frozen=True)
class Asked:
    """What ``moepass.parallelize`` was asked for; ``dims``: the EP dimensions, none where experts stay whole."""

    dims: tuple[str, ...]
    form: str
    tp: str | None = None
    fsdp: str | None = None
    buffer_factor: float | None = None
    chunks: int | str = 1


def check(model: nn.Module, mesh: Any, asked: Asked) -> dict[str, MoE]:
    """The blocks that can be parallelized; raises where one cannot, or where the mesh is wrong."""
    _check_mesh(mesh, asked)
    _check_options(asked)
    found = blocks_of(model)
    if not found:
        raise errors.NotParallel(where=type(model).__name__, detail="it has no moepass.nn.MoE block",
                                 remedy="use moepass.convert first")  # fmt: skip
    for name, block in found.items():
        _check_block(name or type(block).__name__, block, mesh, asked)
    return found


def ranks_of(mesh: DeviceMesh, dims: Iterable[str]) -> int:
    """Ranks along so many dimensions of a mesh."""
    names = mesh.mesh_dim_names or ()
    return math.prod(mesh.size(names.index(dim)) for dim in dims)


def _check_mesh(mesh: Any, asked: Asked) -> None:
    def refuse(detail: str, remedy: str) -> errors.BadMesh:
        return errors.BadMesh(mesh=mesh, detail=detail, remedy=remedy)

    if not isinstance(mesh, DeviceMesh) or not mesh.mesh_dim_names:
        raise refuse("it is not a DeviceMesh with named dimensions",
                     "make one with init_device_mesh(device, shape, mesh_dim_names=...)")  # fmt: skip
    named = [*asked.dims, *(dim for dim in (asked.tp, asked.fsdp) if dim is not None)]
    for dim in named:
        if dim not in mesh.mesh_dim_names:
            raise refuse(f"it has no dimension {dim!r}", f"choose among {', '.join(mesh.mesh_dim_names)}")
    if len(set(named)) < len(named):
        raise refuse("a dimension is named twice", "name different ones")
    if not asked.dims and asked.tp is None:
        raise refuse("neither ep nor tp names a dimension", "name one; without ranks, leave parallelize out")
    if asked.dims and asked.form in FORMS and len(asked.dims) != (2 if asked.form == "hierarchical" else 1):
        raise refuse(f"form={asked.form!r} and ep={asked.dims!r} do not go together",
                     "name two dimensions (nodes, ranks of a node) for 'hierarchical' and one otherwise")  # fmt: skip


def _check_options(asked: Asked) -> None:
    def refuse(name: str, value: Any, detail: str) -> errors.BadOption:
        return errors.BadOption(name=name, value=value, detail=detail)

    if asked.dims and asked.form not in FORMS:
        raise refuse("form", asked.form, f"the forms are {', '.join(FORMS)}")
    if not asked.dims and asked.form != LOCAL:
        raise refuse("form", asked.form, "with ep=None every rank has all experts, and there is nothing to choose")
    if asked.buffer_factor is not None and (asked.form != "all_to_all" or asked.buffer_factor <= 0):
        raise refuse("buffer_factor", asked.buffer_factor,
                     "a buffer belongs to form='all_to_all', and its factor is positive")  # fmt: skip
    if asked.chunks != "auto" and (not isinstance(asked.chunks, int) or asked.chunks < 1):
        raise refuse("chunks", asked.chunks, "give a whole number of at least 1, or 'auto'")
    if asked.chunks not in ("auto", 1) and not asked.dims:
        raise refuse("chunks", asked.chunks, "with ep=None no tokens travel")
    if asked.fsdp is not None and asked.tp is not None:
        raise refuse("fsdp", asked.fsdp, "FSDP2 would cut experts that tp has cut already; use one of the two")


def _check_block(name: str, block: MoE, mesh: DeviceMesh, asked: Asked) -> None:
    def refuse(detail: str, remedy: str) -> errors.NotParallel:
        return errors.NotParallel(where=name, detail=detail, remedy=remedy)

    E, F = block.spec.experts.num_experts, block.spec.experts.intermediate_size
    P, form = ranks_of(mesh, asked.dims), asked.form
    if E % P:
        raise errors.NotDivisible(what="num_experts", value=E, by_what="the ranks of the mesh dimension", by=P,
                                  where=name, remedy="choose a mesh whose EP size divides it")  # fmt: skip
    slices = 1 if asked.tp is None else ranks_of(mesh, [asked.tp])
    if F is not None and F % slices:
        raise errors.NotDivisible(what="intermediate_size", value=F, by_what="the ranks of the TP dimension", by=slices,
                                  where=name, remedy="choose a mesh whose TP size divides it")  # fmt: skip
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
    if isinstance(asked.chunks, int) and asked.chunks > 1 and (whole := whole_tokens(block, asked, P)):
        raise refuse(f"chunks={asked.chunks}: {whole}", "leave chunks out")


def whole_tokens(block: MoE, asked: Asked, P: int) -> str | None:
    """Why its tokens cannot be cut into chunks without changing the result; None where they can."""
    dispatch = block.spec.dispatch
    if dispatch.capacity_factor is not None and not block.drops_before and asked.form != "replicated":
        return "its capacity counts the tokens of all chunks together"
    factor = dispatch.ragged_buffer_factor if asked.buffer_factor is None else asked.buffer_factor
    if asked.form == "all_to_all" and factor is not None:
        never = min(P, block.spec.experts.num_experts / block.spec.router.top_k)
        if factor < never:
            return f"a buffer of {factor:g} times the mean rows, less than {never:g}, drops other rows of chunks"
    return None


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
