"""Which form, and how many chunks, ``moepass.parallelize`` takes unless told: the planner's, the same on every rank.

Only facts that all ranks share go in: shapes, the mesh, presets of the hardware and its links.  A calibrated profile
may differ from rank to rank, and the collectives of different forms do not meet.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from moepass import pointwise
from moepass.lowering.ep_cost import price
from moepass.lowering.ep_plan import on_mesh
from moepass.lowering.forms import ALL_GATHER, ALL_TO_ALL, HIERARCHICAL, RAGGED, REPLICATED
from moepass.lowering.hardware import nearest_preset
from moepass.lowering.links import assumed
from moepass.lowering.mesh import EP_NAMES, MeshDim, MeshSpec
from moepass.lowering.plan import Workload
from moepass.nn.moe import MoE
from moepass.parallel.checks import Asked, ranks_of, whole_tokens

#: Tokens of a rank where nobody says how many.
TOKENS = 4096
#: ``all_gather`` is taken where it holds at most so many times the bytes of ``all_to_all``.
MEMORY = 1.25


def planned_form(
    blocks: Iterable[MoE], mesh: Any, dims: tuple[str, ...], *, tokens: int, buffer_factor: float | None, train: bool
) -> str:
    """The form for all blocks, by the one with the largest experts.

    ``tokens``   of a rank; 0 or less where unknown
    Two dimensions: ``hierarchical``, the only form over two.  Blocks with a buffer: ``all_to_all``, the only form that
    has one.  Otherwise the faster of ``all_to_all`` and ``all_gather``, if the latter's memory allows.
    What is wrong with a mesh or a block is for ``parallel.checks`` to say.
    """
    found = list(blocks)
    if len(dims) == 2:
        return HIERARCHICAL
    buffered = buffer_factor is not None or any(b.spec.dispatch.ragged_buffer_factor is not None for b in found)
    if buffered or not found or not isinstance(mesh, DeviceMesh) or dims[0] not in (mesh.mesh_dim_names or ()):
        return ALL_TO_ALL
    P = mesh.size((mesh.mesh_dim_names or ()).index(dims[0]))
    if P == 1 or any(block.spec.experts.num_experts % P for block in found):
        return ALL_TO_ALL
    largest = max(found, key=lambda block: block.w_in.numel())
    return cheaper(_workload(largest, tokens if tokens > 0 else TOKENS, mesh.device_type, train), P)


def _workload(block: MoE, tokens: int, device: str, train: bool) -> Workload:
    experts = block.spec.experts
    E, rows, D = block.w_in.shape
    n = pointwise.n_inputs(str(experts.activation))
    return Workload(
        tokens=tokens,
        D=D,
        F=rows // n,
        E=E,
        K=block.spec.router.top_k,
        n=n,
        dtype=str(block.w_in.dtype).removeprefix("torch."),
        device=device,
        train=train,
        bias=block.b_in is not None or block.b_out is not None,
        activation_flops=pointwise.flops_per_element(str(experts.activation)),
        capacity_factor=block.spec.dispatch.capacity_factor,
        shared=experts.shared_intermediate_size or 0,
    )


def planned_chunks(blocks: Iterable[MoE], mesh: DeviceMesh, asked: Asked, *, tokens: int, train: bool) -> int:
    """In how many chunks the tokens travel, by the block with the largest experts; 1 where a block cannot be cut."""
    found, P = list(blocks), ranks_of(mesh, asked.dims)
    if P == 1 or mesh.device_type == "cpu" or any(whole_tokens(block, asked, P) for block in found):
        return 1
    largest = max(found, key=lambda block: block.w_in.numel())
    work = _workload(largest, tokens if tokens > 0 else TOKENS, mesh.device_type, train)
    sizes = [ranks_of(mesh, [dim]) for dim in asked.dims]
    buffer = largest.spec.dispatch.ragged_buffer_factor if asked.buffer_factor is None else asked.buffer_factor
    form = RAGGED if asked.form == ALL_TO_ALL and buffer is not None else asked.form
    return chunks(form, work, sizes, buffer, 1 if asked.tp is None else ranks_of(mesh, [asked.tp]))


def chunks(form: str, work: Workload, sizes: Sequence[int], buffer_factor: float | None = None, tp: int = 1) -> int:
    """What ``ep_cost`` says pays on ranks of so many nodes and of each node, or of one dimension."""
    hw = nearest_preset(work.device)
    same = form == REPLICATED
    spread = on_mesh(work, _mesh(work.device, sizes, tp), same_tokens=same, buffer_factor=buffer_factor)
    found = price(form, spread, hw)
    return 1 if found is None else found.overlap.chunks


def _mesh(device: str, sizes: Sequence[int], tp: int = 1) -> MeshSpec:
    """Ranks with the links of presets; the outermost dimension joins nodes where one machine has fewer ranks."""
    hw, P = nearest_preset(device), math.prod(sizes)
    between = int(os.environ.get("LOCAL_WORLD_SIZE", P)) < P
    names = EP_NAMES[-len(sizes) :]
    dims = [
        MeshDim(name=name, size=size, link=assumed(hw.name, device, between_nodes=between and name == names[0]))
        for name, size in zip(names, sizes, strict=True)
    ]
    if tp > 1:
        dims.append(MeshDim(name="tp", size=tp, link=assumed(hw.name, device, between_nodes=False)))
    return MeshSpec(dims=tuple(dims), ep=tuple(names), tp="tp" if tp > 1 else None)


def cheaper(work: Workload, P: int) -> str:
    """``all_gather`` where it is estimated to be faster and its memory allows, else ``all_to_all``."""
    hw = nearest_preset(work.device)
    spread = on_mesh(work, _mesh(work.device, [P]))
    rows, gathered = price(ALL_TO_ALL, spread, hw), price(ALL_GATHER, spread, hw)
    assert rows is not None, "P divides E, and is more than one"
    assert gathered is not None, "P divides E, and is more than one"
    lean = gathered.buffer_bytes + gathered.saved_bytes <= MEMORY * (rows.buffer_bytes + rows.saved_bytes)
    return ALL_GATHER if lean and gathered.total < rows.total else ALL_TO_ALL
