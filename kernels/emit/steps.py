"""A program's launches as steps of an emitted block: which buffers each takes, allocates and hands on.

Routing is one step of up to three launches; every other launch is a step of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moepass.kernels.fused.launch import SCALARS, Buffer, Launch, Program


@dataclass(frozen=True)
class Step:
    """Launches that stand in one file.

    ``name``       of the file, such as ``forward_up``
    ``takes``      buffers and inputs that it reads
    ``allocates``  buffers that it makes; ``gives``: those of them that later steps or the caller read
    """

    name: str
    launches: tuple[Launch, ...]
    takes: tuple[str, ...]
    allocates: tuple[Buffer, ...]
    gives: tuple[str, ...]


def steps(program: Program, direction: str) -> tuple[Step, ...]:
    """The steps of a ``forward`` or ``backward`` program, in order."""
    groups = _groups(program.launches)
    made: list[Step] = []
    known: set[str] = set(program.inputs)
    for i, (name, launches) in enumerate(groups):
        bound = _bound(launches)
        fresh = tuple(b for b in program.buffers if b.name in bound and b.name not in known)
        later = {n for _, group in groups[i + 1 :] for n in _bound(group)} | set(program.results)
        gives = tuple(b.name for b in fresh if b.name in later)
        made.append(Step(f"{direction}_{name}", launches, tuple(n for n in bound if n in known), fresh, gives))
        known |= {b.name for b in fresh}
    return tuple(made)


def _groups(launches: Sequence[Launch]) -> list[tuple[str, tuple[Launch, ...]]]:
    routing = tuple(launch for launch in launches if launch.kernel.startswith("routing."))
    rest: list[tuple[str, tuple[Launch, ...]]] = [(x.name, (x,)) for x in launches if x not in routing]
    return [("routing", routing), *rest] if routing else rest


def _bound(launches: Sequence[Launch]) -> tuple[str, ...]:
    """Names of the tensors that launches are given, each once, in order."""
    names = (a.binding for launch in launches for a in launch.arguments)
    return tuple(dict.fromkeys(name for name in names if name not in SCALARS))
