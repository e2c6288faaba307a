"""``moepass.parallelize``: the experts of a model go to the ranks of a mesh dimension.

Contract
    in    a model with ``nn.MoE`` blocks, the same on all ranks of the mesh up to the values of its parameters, which
          are taken from the mesh's first rank (as DDP does); on the meta device nothing is exchanged
    out   the same model: ``w_in``, ``w_out``, ``b_in``, ``b_out`` of every block are DTensors, ``Shard(0)`` over the EP
          dimension, and over ``tp`` sharded along F (``nn.sharded`` says how); everything else is whole on every rank
    Collective: all ranks call it.  A wrong mesh is refused before any collective, and then blocks, dtypes and settings
    that differ between ranks are named.  Nothing is changed unless all is well.
    Order: convert -> parallelize -> DDP or FSDP -> optimizer -> compile.

Whose gradients: every rank has its own tokens and the loss is the mean over ranks, as under DDP.  Gradients of the
experts then come out whole and divided by P; those of everything else are this rank's, for DDP, FSDP or
``moepass.parallel.average_gradients`` to average.  ``form="replicated"``: the tokens are the same on all ranks, and
all gradients come out whole.  The ranks of ``tp`` hold the same tokens, whatever the form, and all gradients are equal
on them; the mean over ranks is that over the other dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from moepass import _compat
from moepass.lowering.ep.settings import ANY, EQUAL
from moepass.lowering.forms import LOCAL
from moepass.nn.moe import MoE
from moepass.nn.sharded import EXPERT_WEIGHTS, F_DIM, STACKED, ExpertParallel
from moepass.parallel.agreement import agree
from moepass.parallel.checks import Asked, blocks_of, check
from moepass.parallel.choice import planned_chunks, planned_form

Model = TypeVar("Model", bound=nn.Module)
Form = Literal["auto", "replicated", "all_gather", "all_to_all", "hierarchical"]


def parallelize(
    model: Model,
    mesh: DeviceMesh,
    ep: str | Sequence[str] | None = "ep",
    *,
    tp: str | None = None,
    fsdp: str | None = None,
    form: Form = "auto",
    buffer_factor: float | None = None,
    tokens: int | Literal["any", "equal"] | None = None,
    chunks: int | Literal["auto"] = "auto",
    reduce: Literal["mean", "sum"] = "mean",
) -> Model:
    """Shard the experts of every MoE block over the mesh dimension ``ep``; returns the model.

    ``ep``             a dimension of the mesh, or two: (between nodes, within a node) for ``form="hierarchical"``;
                       None: every rank has all experts, and ``tp`` shards each of them
    ``tp``             a dimension whose ranks hold the same tokens, and F/tp of every routed expert: rows of the input
                       projections, columns of the output projection.  Their parts of a token's result are summed
                       (all-reduce, both ways)
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
    ``chunks``         the tokens travel and are computed in so many parts, the experts' work on one over the exchange
                       of another; ``auto``: as many as the planner's prices say pay, from what all ranks know (for
                       4096 tokens of a rank where ``tokens`` is no number); never more than 1 on a CPU
    ``reduce``         how data parallelism reduces the other gradients: experts' are divided by P for ``mean``

    A shared expert runs while the rows of the routed ones travel.
    Raises ``BadMesh``, ``BadOption``, ``NotDivisible`` (E over P, F over tp), ``NotParallel`` (what cannot be computed
    over ranks) and ``RanksDiffer``.
    """
    asked, found = _checked(model, mesh, Asked(_dims(ep), form, tp, fsdp, buffer_factor, chunks), tokens)
    settings = {block: _settings(block, mesh, asked, tokens, mean=reduce == "mean") for block in found.values()}
    agree(model, mesh, {name: settings[block] for name, block in found.items()})
    take_from_first_rank(model, mesh)
    for block in found.values():
        _shard(block, mesh, asked)
        block.parallel = settings[block]
    _compat.ignored_by_ddp(model, [f"{n}.{w}".lstrip(".") for n, b in found.items() for w in EXPERT_WEIGHTS])
    if fsdp is not None:
        _fully_shard(model, list(found.values()), mesh, asked.dims, fsdp)
    return model


def _dims(ep: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if ep is None else (ep,) if isinstance(ep, str) else tuple(ep)


def _checked(model: nn.Module, mesh: DeviceMesh, asked: Asked, tokens: Any) -> tuple[Asked, dict[str, MoE]]:
    """The blocks, and what was asked for with a form and a number of chunks that every rank chooses alike."""
    T = tokens if isinstance(tokens, int) else 0
    if asked.form == "auto":
        blocks = blocks_of(model).values()
        chosen = LOCAL
        if asked.dims:
            chosen = planned_form(blocks, mesh, asked.dims, tokens=T, buffer_factor=asked.buffer_factor,
                                  train=model.training)  # fmt: skip
        asked = replace(asked, form=chosen)
    found = check(model, mesh, asked)
    if asked.chunks == "auto":
        asked = replace(asked, chunks=planned_chunks(found.values(), mesh, asked, tokens=T, train=model.training))
    return asked, found


def _settings(block: MoE, mesh: DeviceMesh, asked: Asked, tokens: Any, *, mean: bool) -> ExpertParallel:
    losses = _loss_groups(mesh, asked)
    factor = _factor(block, asked.form, asked.buffer_factor)
    groups = tuple(_group(mesh, dim).group_name for dim in asked.dims)
    tp = () if asked.tp is None else (mesh.get_group(asked.tp).group_name,)
    return ExpertParallel(
        groups=groups,
        form=asked.form,
        buffer_factor=factor,
        tokens=_tokens(tokens, factor),
        mean=mean,
        loss_groups=tuple(group.group_name for group in losses),
        loss_ranks=math.prod(group.size() for group in losses),
        tp=tp,
        chunks=int(asked.chunks),
        places=_compat.places((*groups, *tp)),
    )


def _group(mesh: DeviceMesh, dim: str) -> dist.ProcessGroup:
    """The EP group of one dimension, never the default group, in whose queue everybody's collectives stand."""
    group = mesh.get_group(dim)
    world = dist.group.WORLD
    return _own_group(world) if world is not None and group.group_name == world.group_name else group


@functools.lru_cache(maxsize=1)
def _own_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A second group of all ranks, made once; all of them are here, for they hold the mesh."""
    made = dist.new_group(list(range(world.size())), group_desc="moepass_ep")
    assert isinstance(made, dist.ProcessGroup)
    return made


def _factor(block: MoE, form: str, given: float | None) -> str | None:
    """The argument, or the spec's own buffer for the form that has one; as text."""
    factor = given if given is not None else block.spec.dispatch.ragged_buffer_factor
    return repr(float(factor)) if factor is not None and form == "all_to_all" else None


def _loss_groups(mesh: DeviceMesh, asked: Asked) -> list[dist.ProcessGroup]:
    """All dimensions of the mesh but those on which the tokens are the same."""
    same = {asked.tp, *(asked.dims if asked.form == "replicated" else ())}
    return [mesh.get_group(name) for name in mesh.mesh_dim_names or () if name not in same]


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
def _shard(block: MoE, mesh: DeviceMesh, asked: Asked) -> None:
    """Keep this rank's part of every expert weight."""
    part = mesh[tuple(dim for dim in mesh.mesh_dim_names or () if dim in (*asked.dims, asked.tp))]
    n = block.spec.experts.n_projections
    for name in EXPERT_WEIGHTS:
        weight = getattr(block, name)
        if weight is not None:
            sharded = own_part(name, weight, part, asked.tp, n)
            setattr(block, name, nn.Parameter(sharded, requires_grad=weight.requires_grad))


def own_part(name: str, weight: Tensor, mesh: DeviceMesh, tp: str | None, n: int) -> DTensor:
    """This rank's part of an expert weight that is whole everywhere, as a DTensor; the whole is not kept alive."""
    if tp is not None and name in STACKED:
        weight = weight.unflatten(1, (n, -1))
    along_f: Placement = Shard(F_DIM) if name != "b_out" else Replicate()
    placements = [along_f if dim == tp else Shard(0) for dim in mesh.mesh_dim_names or ()]
    local = weight.detach()
    for d in range(weight.dim()):
        begin, end = own_range(weight.shape[d], d, mesh, placements)
        local = local.narrow(d, begin, end - begin)
    return DTensor.from_local(local.clone(memory_format=torch.contiguous_format), mesh, placements, run_check=False)


def own_rows(rows: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Begin and end of this rank's part of so many rows, sharded over all dimensions of a mesh."""
    return own_range(rows, 0, mesh, [Shard(0)] * mesh.ndim)


def own_range(size: int, d: int, mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[int, int]:
    """Begin and end of this rank's part of dimension ``d``, evenly sharded, the mesh's first dimension outermost."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    number, parts = 0, 1
    for i, placement in enumerate(placements):
        if placement.is_shard(d):
            number, parts = number * mesh.size(i) + coordinate[i], parts * mesh.size(i)
    each = size // parts
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
