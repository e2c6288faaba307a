"""The mesh of ranks that a plan is made for: dimensions outermost first, which of them hold experts, and their links.

``"node=16,ep=8"`` is 16 nodes of 8 ranks.  Neighbours along the last dimension have consecutive ranks, as in a
``torch.distributed`` ``DeviceMesh`` of the same shape and names.  Experts are sharded over the EP dimensions; a rank's
E/P experts follow one another.  No process group is needed: a mesh here is a description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from moepass import errors
from moepass.frozen import Frozen
from moepass.lowering.links import Link, default, link

if TYPE_CHECKING:
    from moepass.lowering.hardware import Hardware

#: Dimensions that hold experts where nobody says which.
EP_NAMES = ("node", "ep")
#: Dimensions whose neighbours sit on different nodes.
NODE_NAMES = ("node", "nodes", "pod")
_EXAMPLE = "write NAME=SIZE, outermost first, such as node=16,ep=8"


class MeshDim(Frozen):
    """``size`` ranks in a row, joined by ``link``."""

    name: str
    size: int = Field(ge=1)
    link: Link

    def __str__(self) -> str:
        return f"{self.name}={self.size} ({self.link.name})"


class MeshSpec(Frozen):
    """Dimensions, outermost first; ``ep`` names those over which the experts are sharded.

    ``tp`` names the dimension, if any, whose ranks hold the same tokens and F/tp of every expert.
    """

    dims: tuple[MeshDim, ...]
    ep: tuple[str, ...]
    tp: str | None = None

    @property
    def levels(self) -> tuple[MeshDim, ...]:
        """The EP dimensions of more than one rank, outermost first."""
        return tuple(dim for dim in self.dims if dim.name in self.ep and dim.size > 1)

    @property
    def P(self) -> int:
        """EP ranks: over how many ranks one block's experts are spread."""
        return math.prod(dim.size for dim in self.levels)

    @property
    def slices(self) -> tuple[MeshDim, ...]:
        """The TP dimension, if it has more than one rank."""
        return tuple(dim for dim in self.dims if dim.name == self.tp and dim.size > 1)

    @property
    def tp_size(self) -> int:
        """Ranks that share each expert."""
        return math.prod(dim.size for dim in self.slices)

    @property
    def ranks(self) -> int:
        """All ranks, those of other dimensions (data parallel, tensor parallel) included."""
        return math.prod(dim.size for dim in self.dims)

    def __str__(self) -> str:
        return (
            " x ".join(map(str, self.dims))
            + f", experts over {' x '.join(self.ep)}: P = {self.P}"
            + (f", each over {self.tp}: {self.tp_size}" if self.slices else "")
        )


def parse(
    text: str, hw: Hardware, *, ep: Sequence[str] | None = None, links: str | None = None, tp: str | None = None
) -> MeshSpec:
    """The mesh that ``text`` says, with a link for each dimension.

    ``ep``     names of the dimensions that hold experts; by default those called ``node`` and ``ep``
    ``tp``     the dimension whose ranks share each expert's F; None: experts are whole
    ``links``  ``"node=ib,ep=nvlink"``, or one link for all; by default those of ``hw`` (``links.default``)
    Raises ``BadMesh``, ``UnknownLink`` and ``BadProfile``.
    """
    sizes = _sizes(text)
    named = _links(links, sizes)
    dims = tuple(
        MeshDim(
            name=name,
            size=size,
            link=link(named[name])
            if name in named
            else default(hw.name, hw.device, between_nodes=name in NODE_NAMES, ranks=size),
        )
        for name, size in sizes.items()
    )
    return MeshSpec(dims=dims, ep=_ep(text, sizes, ep, tp), tp=tp)


def _sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier():
            raise _bad(text, where=repr(part), detail="is not a dimension", remedy=_EXAMPLE)
        if not (number.isascii() and number.isdigit()) or int(number) < 1:
            raise _bad(text, where=f"{name}={number}", detail="is no size", remedy="give a whole number of at least 1")
        if name in sizes:
            raise _bad(
                text,
                where=f"dimension {name!r}",
                detail="occurs twice",
                remedy="give each dimension its own name",
            )
        sizes[name] = int(number)
    return sizes


def _ep(text: str, sizes: Mapping[str, int], ep: Sequence[str] | None, tp: str | None) -> tuple[str, ...]:
    """The EP dimensions in the mesh's order; none only where ``tp`` shares the experts out in its way."""
    wanted = [name for name in EP_NAMES if name in sizes and name != tp] if ep is None else list(ep)
    for kind, name in [*(("EP", name) for name in wanted), *([("TP", tp)] if tp is not None else [])]:
        if name not in sizes:
            raise _bad(
                text,
                where=f"the {kind} dimension {name!r}",
                detail="is not in it",
                remedy=f"name one of {_names(sizes)}",
            )
    if tp in wanted:
        raise _bad(text, where=f"dimension {tp!r}", detail="is named for EP and TP", remedy="name different ones")
    if not wanted and tp is None:
        raise _bad(
            text,
            where="no dimension",
            detail="is called 'ep' or 'node', so none would hold experts",
            remedy=f"say which do: --ep with one of {_names(sizes)}",
        )
    return tuple(name for name in sizes if name in wanted)


def _links(text: str | None, sizes: Mapping[str, int]) -> dict[str, str]:
    """``"node=ib,ep=nvlink"`` or ``"ib"`` -> a link's name for each dimension that is spoken of."""
    if text is None:
        return {}
    if "=" not in text:
        return dict.fromkeys(sizes, text.strip())
    named: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in sizes:
            raise _bad(
                text,
                where=f"the link {part.strip()!r}",
                detail="belongs to no dimension of the mesh",
                remedy=f"write DIMENSION=LINK with DIMENSION one of {_names(sizes)}",
            )
        named[name] = value
    return named


def _bad(text: str, *, where: str, detail: str, remedy: str) -> errors.BadMesh:
    return errors.BadMesh(mesh=f"mesh {text!r}", detail=f"{where} {detail}", remedy=remedy)


def _names(sizes: Mapping[str, int]) -> str:
    return ", ".join(sizes)
