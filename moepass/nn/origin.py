"""Where the weights of an ``nn.MoE`` came from: names of dense matrices, an init method, a name for the draws.

``moepass.convert`` records it on the module (``MoE.origin``); load hooks, ``moepass.save`` and the command read it.
With the spec it is all that ``upcycle.init`` needs to make the same weights from a dense state dict.  Names and numbers
only: it can be copied, pickled and written as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepass.spec import InitSpec


@dataclass(frozen=True)
class Part:
    """One dense projection: names of its tensors, which ``rows`` of them, stored ``[in, out]`` if ``transposed``."""

    weight: str
    bias: str | None
    rows: tuple[int, int]
    transposed: bool

    def read(self, get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor | None]:
        """``(weight [rows, in], bias [rows])`` of the projection; ``get`` gives a tensor by its name."""
        stored = get(self.weight)
        weight = (stored.t() if self.transposed else stored)[self.rows[0] : self.rows[1]]
        return weight, None if self.bias is None else get(self.bias)[self.rows[0] : self.rows[1]]

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensors' names."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Place:
    """A place of the MoE in the model, and the dense projections that stood there; all names from the same root."""

    where: str
    ups: tuple[Part, ...]
    down: Part

    @property
    def names(self) -> tuple[str, ...]:
        """Every dense tensor's name, each once."""
        return tuple(dict.fromkeys(name for part in (*self.ups, self.down) for name in part.names))

    @property
    def root(self) -> str:
        """The innermost module that holds the MoE (or is it) and held all dense tensors."""
        paths = [self.where.split("."), *(name.split(".")[:-1] for name in self.names)]
        depth = 0
        while all(len(path) > depth and path[depth] == paths[0][depth] for path in paths):
            depth += 1
        return ".".join(paths[0][:depth])


@dataclass(frozen=True)
class Origin:
    """``site`` is the block's name, which seeds the draws.  Several ``places``: blocks that shared their weights."""

    site: str
    init: InitSpec
    places: tuple[Place, ...]


def dense_matrices(
    ups: Sequence[Part], down: Part, get: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``w_in [n*F, D]`` gate rows first, ``w_out [D, F]``, ``b_in [n*F]``, ``b_out [D]``: what ``initialise`` takes."""
    read = [part.read(get) for part in ups]
    biases = [bias for _, bias in read if bias is not None]
    w_out, b_out = down.read(get)
    return torch.cat([w for w, _ in read]), w_out, torch.cat(biases) if biases else None, b_out
