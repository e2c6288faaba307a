"""``moepass.parallel.convert``: a dense model becomes an MoE whose experts are made on the ranks that hold them.

Contract
    in    a dense model that is loaded, or the folder of a causal language model of transformers; a mesh
    out   the model that ``moepass.convert`` and then ``moepass.parallelize`` would make, bit for bit
    A rank has the dense weights (from a folder: those of one block at a time, and what stays dense), and makes E/P of
    the E experts.  Collective; nothing is changed where something is refused.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moepass import errors
from moepass.nn.moe import MoE
from moepass.parallel.checks import blocks_of
from moepass.parallel.placement import own_rows, parallelize, take_from_first_rank
from moepass.spec import InitSpec, MoESpec
from moepass.upcycle.accept import make, state_of
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.convert import convert as convert_whole
from moepass.upcycle.modules import set_tensor_at, tensor_at
from moepass.upcycle.own.plan import dense_on_meta, names_on_disk
from moepass.upcycle.own.skeleton import tied_names
from moepass.upcycle.report import ConversionReport


class Converted(NamedTuple):
    """The model, and what was done."""

    model: nn.Module
    report: ConversionReport


class _Dense(NamedTuple):
    """A model on the meta device, the tensors of its dense original by name, and what makes ranks agree on them."""

    model: nn.Module
    get: Callable[[str], Tensor]
    agree: Callable[[], None]


def convert(
    source: nn.Module | str | os.PathLike[str],
    mesh: DeviceMesh,
    ep: str | Sequence[str] = "ep",
    *,
    spec: MoESpec | None = None,
    layers: str | Sequence[str] = "*",
    every: int = 1,
    init: str | InitSpec = "virtual_groups",
    seed: int = 0,
    **options: Any,
) -> Converted:
    """Upcycle ``source`` straight into shards; a new model, which shares with ``source`` all that stays dense.

    ``spec`` ... ``seed``  those of ``moepass.convert``; ``ep`` and ``options``: those of ``moepass.parallelize`` but
    those that cut experts (``fsdp``, ``tp``).  Of a loaded model the values are those of the mesh's first rank.  Blocks
    are recognised as ``convert`` does, and not compared with the dense ones by numbers.
    Raises what ``convert`` and ``parallelize`` raise; for folders also ``BadCheckpoint``, ``UnexpectedTensor``,
    ``NoHost``.
    """
    for name in ("fsdp", "tp"):
        if options.get(name) is not None:
            detail = "here each rank makes whole experts; use moepass.convert and then parallelize"
            raise errors.BadOption(name=name, value=options[name], detail=detail)
    dense = _live(source, mesh) if isinstance(source, nn.Module) else _folder(Path(source), mesh.device_type)
    report = convert_whole(dense.model, spec, layers=layers, every=every, init=init, seed=seed)
    model = parallelize(dense.model, mesh, ep, **options)
    dense.agree()
    _fill(model, dense.get)
    return Converted(model, report)


# --- where dense tensors come from -----------------------------------------------------------------------------------


def _live(model: nn.Module, mesh: DeviceMesh) -> _Dense:
    """A twin of a loaded model without its parameters."""
    held = dict(model.named_parameters(remove_duplicate=False))
    for name, p in held.items():
        if isinstance(mesh, DeviceMesh) and p.device.type != mesh.device_type:
            detail = f"it is of {mesh.device_type} devices, and {name} is on {p.device}"
            raise errors.BadMesh(mesh=mesh, detail=detail, remedy="move the model first")
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in held.values()
    }
    twin = copy.deepcopy(model, memo)
    return _Dense(twin, held.__getitem__, lambda: take_from_first_rank(model, mesh))


def _folder(folder: Path, device: str) -> _Dense:
    source = Source.open(folder)
    model = dense_on_meta(source, device)
    disk = names_on_disk(model, source)
    return _Dense(model, lambda name: source.read(disk[name]).to(device), lambda: None)


# --- where they go ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _fill(model: nn.Module, get: Callable[[str], Tensor]) -> None:
    """Put a tensor into every place that is on meta."""
    blocks = blocks_of(model)
    inside = {id(t) for block in blocks.values() for t in block.state_dict(keep_vars=True).values()}
    for names in tied_names(model):
        old = tensor_at(model, names[0])
        if id(old) in inside or not old.is_meta:
            continue
        new = get(names[0])
        if isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for name in names:
            set_tensor_at(model, name, new)
    for block in blocks.values():
        _fill_block(block, get)


def _fill_block(block: MoE, get: Callable[[str], Tensor]) -> None:
    """This rank's experts, and what is whole on every rank."""
    assert block.origin is not None
    assert isinstance(block.w_in, DTensor), "parallelize was called"
    experts = range(*own_rows(block.spec.experts.num_experts, block.w_in.device_mesh))
    for name, value in state_of(block, make(block, block.origin.places[0], get, experts)).items():
        old, new = tensor_at(block, name), value
        if isinstance(old, DTensor):
            assert all(placement == Shard(0) for placement in old.placements), "experts are cut by their number alone"
            new = DTensor.from_local(value, old.device_mesh, old.placements, run_check=False)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        set_tensor_at(block, name, new)
    block.router.materialise()
