"""What a model would cost elsewhere: every kind of block, on every machine, under every routing."""

from __future__ import annotations

from collections.abc import Sequence

from moepass.lowering.hardware import load_hardware
from moepass.lowering.plan import Sweep, Workload
from moepass.lowering.sweep import TOKENS, sweep
from moepass.preview.mesh import Spread, mesh_sweeps
from moepass.preview.model import check_routing
from moepass.preview.run import explain_target


def sweeps(
    name: str,
    hardware: Sequence[str | None],
    routings: Sequence[str],
    tokens: Sequence[int] = (),
    *,
    dtype: str | None = None,
    train: bool = False,
    meshes: Sequence[Spread] = (),
) -> list[Sweep]:
    """Sweeps of MODEL's distinct blocks; the model is traced once.

    ``meshes``    price the expert-parallel forms on each of them, T being a rank's tokens, instead of the lowerings.
    ``hardware``  names of presets or profiles; None: this machine.  ``tokens``: none given means powers of two.
    Raises ``BadOption`` for an unknown routing, ``UnknownHardware``, and as ``explain_target``.
    """
    for routing in routings:
        check_routing(routing)
    machines = [load_hardware(each) for each in hardware]
    for asked in meshes:
        for hw in machines:
            asked.check(hw)
    report = explain_target(name, tokens=tokens or (512,), dtype=dtype, train=train, hardware=hardware[0])
    blocks = dict.fromkeys(found.workload for found in report.sweeps)
    works = [block.model_copy(update={"routing": routing}) for block in blocks for routing in routings]
    if meshes:
        return [found for hw in machines for found in mesh_sweeps(works, meshes, hw, tokens or TOKENS)]
    return [sweep(_on(work, hw.device), hw, tokens or TOKENS) for work in works for hw in machines]


def _on(work: Workload, device: str) -> Workload:
    """The block as it would be there: the model itself was traced on the meta device."""
    return work.model_copy(update={"device": device}) if work.device == "meta" else work
