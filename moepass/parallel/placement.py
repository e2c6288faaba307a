"""``moepass.parallelize``: the experts of a model go to the ranks of a mesh dimension.

Contract
    in    a model with ``nn.MoE`` blocks, the same on all ranks of the mesh up to the values of its parameters, which
          are taken from the mesh's first rank (as DDP does); on the meta device nothing is exchanged
    out   the same model: ``w_in``, ``w_out``, ``b_in``, ``b_out`` of every block are DTensors, ``Shard(0)`` over the EP
          dimension; everything else is whole on every rank
    Collective: all ranks call it.  A wrong mesh is refused before any collective, and then blocks, dtypes and settings
    that differ between ranks are named.  Nothing is changed unless all is well.
    Order: convert -> parallelize -> DDP or FSDP -> optimizer -> compile.

Whose gradients: every rank has its own tokens and the loss is the mean over ranks, as under DDP.  Gradients of the
experts then come out whole and divided by P; those of everything else are this rank's, for DDP, FSDP or
``moepass.parallel.average_gradients`` to average.  ``form="replicated"``: the tokens are the same on all ranks, and
all gradients come out whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from moepass import _compat
from moepass.lowering.ep.settings import ANY, EQUAL
from moepass.nn.moe import MoE
from moepass.nn.sharded import EXPERT_WEIGHTS, ExpertParallel
from moepass.parallel.agreement import agree
from moepass.parallel.checks import blocks_of, check
from moepass.parallel.choice import planned_form

Model = TypeVar("Model", bound=nn.Module)
Form = Literal["auto", "replicated", "all_gather", "all_to_all", "hierarchical"]


def parallelize(
    model: Model,
    mesh: DeviceMesh,
    ep: str | Sequence[str] = "ep",
    *,
    fsdp: str | None = None,
    form: Form = "auto",
    buffer_factor: float | None = None,
    tokens: int | Literal["any", "equal"] | None = None,
    reduce: Literal["mean", "sum"] = "mean",
) -> Model:
    """Shard the experts of every MoE block over the mesh dimension ``ep``; returns the model.

    ``ep``             a dimension of the mesh, or two: (between nodes, within a node) for ``form="hierarchical"``
    ``fsdp``           a dimension over which ``fully_shard`` (FSDP2) is applied to the experts; everything else is
                       sharded over it and ``ep`` together
    ``form``           ``all_to_all``: rows travel; ``all_gather``: tokens are gathered; ``hierarchical``: rows travel
                       in two steps; ``replicated``: you promise that the ranks hold the same tokens; ``auto``:
                       ``hierarchical`` where ``ep`` names two dimensions, else what the planner's prices say of
                       ``all_to_all`` and ``all_gather`` (``parallel.choice``)
    ``buffer_factor``  ``all_to_all`` in blocks of ``ceil(factor*T*K/P)`` rows: no host read, static shapes, and rows
                       beyond are dropped (``dropped_tokens`` in the block's metrics); the spec's
                       ``ragged_buffer_factor`` where there is one; min(P, E/K) never drops
    ``tokens``         how many tokens the other ranks have: ``any``, ``equal`` to this rank's, or a number that none
                       exceeds.  ``any`` costs a host read in ``all_gather`` and in ``all_to_all`` with a factor.
                       By default ``equal`` with a factor, else ``any``
    ``reduce``         how data parallelism reduces the other gradients: experts' are divided by P for ``mean``

    Raises ``BadMesh``, ``NotDivisible`` (E over P), ``NoBlocks``, ``NotParallel`` (what cannot be computed over ranks)
    and ``RanksDiffer``.
    """
    dims = (ep,) if isinstance(ep, str) else tuple(ep)
    chosen: str = form
    if form == "auto":
        T = tokens if isinstance(tokens, int) else 0
        blocks = blocks_of(model).values()
        chosen = planned_form(blocks, mesh, dims, tokens=T, buffer_factor=buffer_factor, train=model.training)
    found = check(model, mesh, dims, fsdp, chosen, buffer_factor)
    groups = tuple(mesh.get_group(dim) for dim in dims)
    losses = _loss_groups(mesh, dims, chosen)
    settings = {
        block: ExpertParallel(
            groups=tuple(group.group_name for group in groups),
            form=chosen,
            buffer_factor=_factor(block, chosen, buffer_factor),
            tokens=_tokens(tokens, _factor(block, chosen, buffer_factor)),
            mean=reduce == "mean",
            loss_groups=tuple(group.group_name for group in losses),
            loss_ranks=math.prod(group.size() for group in losses),
        )
        for block in found.values()
    }
    agree(model, mesh, {name: settings[block] for name, block in found.items()})
    take_from_first_rank(model, mesh)
    for block in found.values():
        _shard(block, mesh, dims)
        block.parallel = settings[block]
    _compat.ignored_by_ddp(model, [f"{n}.{w}".lstrip(".") for n, b in found.items() for w in EXPERT_WEIGHTS])
    if fsdp is not None:
        _fully_shard(model, list(found.values()), mesh, dims, fsdp)
    return model


def _factor(block: MoE, form: str, given: float | None) -> str | None:
    """The argument, or the spec's own buffer for the form that has one; as text."""
    factor = given if given is not None else block.spec.dispatch.ragged_buffer_factor
    return repr(float(factor)) if factor is not None and form == "all_to_all" else None


def _loss_groups(mesh: DeviceMesh, dims: tuple[str, ...], form: str) -> list[dist.ProcessGroup]:
    """All dimensions of the mesh but those on which the tokens are the same."""
    return [mesh.get_group(n) for n in mesh.mesh_dim_names or () if form != "replicated" or n not in dims]


def _tokens(given: int | str | None, factor: str | None) -> int:
    if given is None:
        return ANY if factor is None else EQUAL
    return {"any": ANY, "equal": EQUAL}[given] if isinstance(given, str) else given


# --- placement -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def take_from_first_rank(model: nn.Module, mesh: DeviceMesh) -> None:
    """Parameters and buffers of the mesh's first rank, everywhere."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta and not isinstance(t, DTensor)]
    for group in mesh.get_all_groups():
        source = dist.get_global_rank(group, 0)
        for tensor in tensors:
            dist.broadcast(tensor.data, source, group=group)


@torch.no_grad()
def _shard(block: MoE, mesh: DeviceMesh, dims: tuple[str, ...]) -> None:
    """Keep this rank's part of every expert weight."""
    part = mesh[dims]
    for name in EXPERT_WEIGHTS:
        weight = getattr(block, name)
        if weight is not None:
            setattr(block, name, nn.Parameter(own_part(weight, part), requires_grad=weight.requires_grad))


def own_part(weight: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's rows of a tensor that is whole everywhere, as a DTensor; the whole is not kept alive."""
    placements: Sequence[Placement] = [Shard(0)] * mesh.ndim
    begin, end = own_rows(weight.shape[0], mesh)
    return DTensor.from_local(weight.detach()[begin:end].clone(), mesh, placements, run_check=False)


def own_rows(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Begin and end of this rank's part of so many rows, sharded over all dimensions of a mesh, the first outermost."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    number = 0
    for d, at in enumerate(coordinate):
        number = number * mesh.size(d) + at
    each = rows // mesh.size()
    return number * each, (number + 1) * each


def _fully_shard(model: nn.Module, blocks: Sequence[MoE], mesh: DeviceMesh, dims: tuple[str, ...], fsdp: str) -> None:
    """FSDP2: experts over ``fsdp``, which they are not sharded over yet, the rest over ``fsdp`` and ``ep`` together."""
    from torch.distributed.fsdp import fully_shard

    every = _compat.flattened(mesh, (fsdp, *dims))
    for block in blocks:
        fully_shard(block.router, mesh=every)
        experts = {id(getattr(block, name)) for name in EXPERT_WEIGHTS}
        rest = {p for p in block.parameters(recurse=False) if id(p) not in experts}
        fully_shard(block, mesh=mesh[fsdp], ignored_params=rest)
    if not any(block is model for block in blocks):
        fully_shard(model, mesh=every)
