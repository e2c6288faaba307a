"""Which form ``moepass.parallelize(form="auto")`` takes: the planner's choice, the same on every rank.

Only facts that all ranks share go in: shapes, the mesh, presets of the hardware and its links.  A calibrated profile
may differ from rank to rank, and the collectives of different forms do not meet.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from moepass import pointwise
from moepass.lowering.ep_cost import price
from moepass.lowering.ep_plan import on_mesh
from moepass.lowering.forms import ALL_GATHER, ALL_TO_ALL, HIERARCHICAL
from moepass.lowering.hardware import nearest_preset
from moepass.lowering.links import assumed
from moepass.lowering.mesh import MeshDim, MeshSpec
from moepass.lowering.plan import Workload
from moepass.nn.moe import MoE

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
    )


def cheaper(work: Workload, P: int) -> str:
    """``all_gather`` where it is estimated to be faster and its memory allows, else ``all_to_all``."""
    device = work.device
    hw = nearest_preset(device)
    between = int(os.environ.get("LOCAL_WORLD_SIZE", P)) < P
    link = assumed(hw.name, device, between_nodes=between)
    spread = on_mesh(work, MeshSpec(dims=(MeshDim(name="ep", size=P, link=link),), ep=("ep",)))
    rows, gathered = price(ALL_TO_ALL, spread, hw), price(ALL_GATHER, spread, hw)
    assert rows is not None, "P divides E, and is more than one"
    assert gathered is not None, "P divides E, and is more than one"
    lean = gathered.buffer_bytes + gathered.saved_bytes <= MEMORY * (rows.buffer_bytes + rows.saved_bytes)
    return ALL_GATHER if lean and gathered.total < rows.total else ALL_TO_ALL
