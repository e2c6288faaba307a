"""A kernel launch as data: which kernel, on which buffers, with which constants, over which grid.

Pure values, without torch and without Triton.  Sizes that follow the number of tokens are ``Extent``s, so that one
program serves every T; everything else is a constant of the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

#: What an extent may count: one, tokens T, routed rows R = T*K, or M-tiles (``tile_bound``).
Unit = Literal["1", "T", "R", "TILES"]
#: Names of the scalars that every program binds at run time.
SCALARS = ("T", "R", "TILES")


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``."""
    return -(-a // b)


def power_of_two(size: int) -> int:
    """The power of two at or above ``size``; no less than 1."""
    return 1 << (max(size, 1) - 1).bit_length()


def tile_bound(R: int, E: int, BLOCK_M: int) -> int:
    """The most M-tiles that R rows over E experts can need; exact, and known without the routing.

    At worst every expert but one has a single row in the last tile, and one expert has all the others.
    """
    return R if R <= E else E - 1 + cdiv(R - E + 1, BLOCK_M)


class Term(NamedTuple):
    """``cdiv(unit, block) * times``."""

    unit: Unit
    block: int = 1
    times: int = 1

    def text(self) -> str:
        """As Python source over T, R, TILES and ``cdiv``."""
        count = self.unit if self.block == 1 else f"cdiv({self.unit}, {self.block})"
        if self.times == 1:
            return count
        return str(self.times) if count == "1" else f"{count} * {self.times}"


@dataclass(frozen=True)
class Extent:
    """A size that may follow T: a sum of terms, or ``most`` where that is less."""

    terms: tuple[Term, ...]
    most: int | None = None

    def at(self, sizes: Mapping[str, int]) -> int:
        """Its value for ``sizes = {"T": ..., "R": ..., "TILES": ...}``."""
        total = sum(cdiv(1 if t.unit == "1" else sizes[t.unit], t.block) * t.times for t in self.terms)
        return total if self.most is None else min(total, self.most)

    def __str__(self) -> str:
        text = " + ".join(term.text() for term in self.terms)
        return text if self.most is None else f"min({text}, {self.most})"


def extent(unit: Unit | int, block: int = 1, times: int = 1) -> Extent:
    """One term, or a constant."""
    return Extent((Term("1", 1, unit),)) if isinstance(unit, int) else Extent((Term(unit, block, times),))


class Argument(NamedTuple):
    """A kernel parameter and what it is bound to: a buffer or one of ``SCALARS``.

    ``type`` is Triton's signature string, such as ``*bf16`` or ``i32``.
    """

    parameter: str
    binding: str
    type: str


class Activation(NamedTuple):
    """Stands for a JIT function of the pointwise program ``text``: its ``value`` or its ``grad``."""

    text: str
    part: Literal["value", "grad"]


#: What a constexpr parameter may be given; an absent buffer is None.
Constant = int | bool | str | None | Activation


@dataclass(frozen=True)
class Buffer:
    """A tensor that a program allocates, contiguous where no ``strides`` (elements) are given."""

    name: str
    dtype: str
    shape: tuple[Extent, ...]
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    ``name``        of the step, unique in its program
    ``kernel``      ``module.function`` in ``moepass.kernels.fused``
    ``arguments``   the parameters that are not constexpr, in the kernel's order
    ``constexprs``  the others
    ``grid``        programs along the only axis
    """

    name: str
    kernel: str
    arguments: tuple[Argument, ...]
    constexprs: tuple[tuple[str, Constant], ...]
    grid: Extent
    num_warps: int = 4
    num_stages: int = 1

    @property
    def descriptors(self) -> bool:
        """Whether the kernel makes TMA descriptors, for which Triton asks its allocator for memory."""
        return bool(dict(self.constexprs).get("TMA"))

    @property
    def arg_types(self) -> dict[str, str]:
        """Triton's signature, ``constexpr`` parameters included."""
        return {a.parameter: a.type for a in self.arguments} | {name: "constexpr" for name, _ in self.constexprs}


@dataclass(frozen=True)
class Program:
    """Launches in order, with the buffers between them.

    ``inputs``   the names that the caller binds
    ``buffers``  what is allocated, results included
    ``results``  the names of the results
    ``block_m``  rows of an M-tile: ``TILES = tile_bound(R, E, block_m)``
    """

    inputs: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]
    results: tuple[str, ...]
    block_m: int
    E: int
    K: int

    def sizes(self, T: int) -> dict[str, int]:
        """The scalars for T tokens."""
        R = T * self.K
        return {"T": T, "R": R, "TILES": tile_bound(R, self.E, self.block_m)}
