"""The committed budget of every selected configuration, and what breaks it.

``budgets.json``: target -> key (``problems.cases``) -> what the kernel needed when the table was written.  A kernel
breaks its budget if it takes more registers (beyond what another compiler version may) or lost its matrix instructions.
None may spill, or take more shared memory than its target has.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from moepass.frozen import Frozen
from moepass.kernels.aot.compile import Resources
from moepass.kernels.fused.launch import Launch
from moepass.kernels.fused.problem import Target

PATH = Path(__file__).with_name("budgets.json")
#: Registers that another version of the compiler may add.
SLACK = 16
#: Constants of a launch that a tile's text names where they are set.
_SWITCHES = {"PERSISTENT": "persistent", "TMA": "tma"}


class Entry(Frozen):
    """A launch's block sizes, a digest of everything that decides its code, and what it needed."""

    tile: str
    digest: str
    resources: Resources


class Budgets(Frozen):
    """The table; ``triton``: the version that compiled it."""

    triton: str
    targets: dict[str, dict[str, Entry]]


@functools.cache
def load() -> Budgets:
    """The committed table."""
    return Budgets.model_validate_json(PATH.read_bytes())


def find(launch: Launch, target: str) -> Resources | None:
    """What this very launch needed, if it is in the table."""
    wanted = digest(launch)
    entries = load().targets.get(target, {}).values()
    return next((entry.resources for entry in entries if entry.digest == wanted), None)


def digest(launch: Launch) -> str:
    """12 hex digits over the kernel, its argument types, constants, warps and stages."""
    decides = [launch.kernel, launch.arg_types, launch.constexprs, launch.num_warps, launch.num_stages]
    return hashlib.sha256(repr(decides).encode()).hexdigest()[:12]


def entry(launch: Launch, resources: Resources) -> Entry:
    """The row of a compiled launch."""
    return Entry(tile=tile_text(launch), digest=digest(launch), resources=resources)


def tile_text(launch: Launch) -> str:
    """Block sizes, warps and stages in one line, such as ``M=64 N=64 K=64 warps=8 stages=4 persistent``."""
    constants = dict(launch.constexprs)
    sizes = [f"{name.removeprefix('BLOCK_')}={constants[name]}" for name in constants if name.startswith("BLOCK_")]
    words = [word for switch, word in _SWITCHES.items() if constants.get(switch)]
    return " ".join([*sizes, f"warps={launch.num_warps}", f"stages={launch.num_stages}", *words])


def unfit(key: str, launch: Launch, target: Target, found: Resources) -> list[str]:
    """What no selected configuration may do, whatever its budget: spill, or want more shared memory than there is."""
    what, said = f"{target.name} {key} ({tile_text(launch)})", []
    if found.spills:
        said.append(f"{what} spills {found.spills}")
    if found.shared > target.shared:
        said.append(f"{what} takes {found.shared} bytes of shared memory, {target.name} has {target.shared}")
    return said


def broken(key: str, launch: Launch, target: Target, found: Resources, budget: Entry | None) -> list[str]:
    """Sentences, one for each way in which a kernel breaks its budget; empty where it keeps it."""
    what = f"{target.name} {key} ({tile_text(launch)})"
    if budget is None:
        return [f"{what} has no budget; run `python -m moepass.kernels.aot --write`"]
    limit, said = budget.resources, []
    if budget.tile != tile_text(launch):
        said.append(f"{what} was {budget.tile}; run `python -m moepass.kernels.aot --write`")
    if found.registers > limit.registers + SLACK:
        said.append(f"{what} takes {found.registers} registers, allowed {limit.registers} + {SLACK}")
    if limit.matrix_ops and not found.matrix_ops:
        said.append(f"{what} has no matrix instruction")
    if limit.wgmma and not found.wgmma:
        said.append(f"{what} has no wgmma")
    if limit.tma and not found.tma:
        said.append(f"{what} has no TMA load")
    return said
