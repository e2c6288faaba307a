"""The options of ``moepass explain`` and ``moepass sweep`` that describe a mesh of ranks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from moepass import errors

if TYPE_CHECKING:
    from moepass.preview.mesh import Spread

_MESH = "Ranks to plan for, outermost dimension first, such as node=16,ep=8; none of them need exist."

Mesh = Annotated[str | None, typer.Option(help=f"{_MESH} T is then a rank's tokens.")]
Meshes = Annotated[list[str] | None, typer.Option("--mesh", help=f"{_MESH} Repeatable. Prices forms, not lowerings.")]
Ep = Annotated[
    str | None, typer.Option(help="Dimensions of --mesh that hold experts. Default: those called node and ep.")
]
Link = Annotated[
    str | None,
    typer.Option(help="Links of --mesh: one preset or profile for all, or node=ib,ep=nvlink. Default: the hardware's."),
]
Tp = Annotated[
    str | None, typer.Option(help="The dimension of --mesh whose ranks share every expert's width. Default: none.")
]
SameTokens = Annotated[
    bool, typer.Option("--same-tokens", help="Every rank of --mesh holds the same T tokens, as in decoding.")
]
BufferFactor = Annotated[
    float | None,
    typer.Option(help="Static buffers of this many times the mean rows, which may drop rows. Default: never drop."),
]


Dist = Annotated[
    int | None,
    typer.Option(
        help="Measure the links among this many ranks instead: those of this torchrun job, or processes here."
    ),
]


def measured_links(ranks: int, device: str) -> str | None:
    """What ``calibrate --dist`` prints: the links as JSON; nothing on the later ranks of a job."""
    from moepass.lowering.calibrate_links import calibrate_links

    found = calibrate_links(ranks, device)
    return found.model_dump_json(indent=2) + "\n" if os.environ.get("RANK", "0") == "0" else None


def asked(
    meshes: list[str],
    ep: str | None,
    link: str | None,
    same_tokens: bool,
    buffer_factor: float | None,
    tp: str | None,
) -> list[Spread]:
    """What the options say.  Raises ``BadOption`` for options that mean nothing without a mesh."""
    given = {"--ep": ep, "--tp": tp, "--link": link, "--same-tokens": same_tokens or None,
             "--buffer-factor": buffer_factor}  # fmt: skip
    for name, value in given.items():
        if value is not None and not meshes:
            raise errors.BadOption(name=name, value=value, detail="it speaks of a mesh; give --mesh too")
    if not meshes:
        return []
    from moepass.preview.mesh import Spread

    names = None if ep is None else [name.strip() for name in ep.split(",")]
    return [Spread(mesh, names, link, same_tokens, buffer_factor, tp) for mesh in meshes]
