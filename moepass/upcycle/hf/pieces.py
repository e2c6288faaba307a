"""The dense model's tensors as the host wants to see them: fused matrices cut into their parts.

A ``Piece`` is a whole tensor of the source or some of its rows; ``pieces`` names each as an unfused model would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from moepass import errors
from moepass.upcycle.checkpoint.tensors import (
    FLOATS,
    Computed,
    Header,
    OutTensor,
    Pieces,
    Streamed,
    Verbatim,
    torch_dtype,
)
from moepass.upcycle.hf.hosts import head_dim
from moepass.upcycle.hf.match import Match


@dataclass(frozen=True)
class Piece:
    """``source`` (or its rows ``begin`` to ``end``), of this shape and dtype."""

    source: str
    shape: tuple[int, ...]
    dtype: str
    rows: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of its source tensor, a view."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


def block_name(layer: int) -> str:
    """Name of a layer's feed-forward block in an unfused model: what globs match and what seeds the draws."""
    return f"model.layers.{layer}.mlp"


def cast_code(code: str, wanted: str | None) -> str:
    """The dtype code of the output: floating tensors follow ``wanted``, others stay."""
    return wanted if wanted is not None and code in FLOATS else code


def pieces(headers: dict[str, Header], found: Match) -> dict[str, Piece]:
    """Unfused name -> piece, in the order of the source.  Frequencies of old checkpoints, which follow from the config,
    are left out."""
    named: dict[str, Piece] = {}
    for name, header in headers.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        for part, piece in _parts(name, header, found):
            named[part] = piece
    return named


def inputs(used: Sequence[Piece]) -> tuple[str, ...]:
    """The source tensors that these pieces need, each once."""
    return tuple(dict.fromkeys(piece.source for piece in used))


def resolve(used: Sequence[Piece], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The pieces themselves, given the tensors of ``inputs(used)``."""
    by_name = dict(zip(inputs(used), tensors, strict=True))
    return [piece.of(by_name[piece.source]) for piece in used]


def computed(
    used: Sequence[Piece], function: Callable[[list[Tensor]], Tensor], digest: str, dtype: torch.dtype
) -> Computed:
    """A recipe over pieces; the result is cast to ``dtype``."""

    def run(*tensors: Tensor) -> Tensor:
        return function(resolve(used, tensors)).to(dtype)

    return Computed(inputs(used), run, f"{digest}{_rows(used)} {dtype}")


def _rows(used: Sequence[Piece]) -> str:
    return "".join(f" {piece.rows[0]}:{piece.rows[1]}" for piece in used if piece.rows is not None)


def streamed(
    piece: Piece, beside: Sequence[Piece], begin: Callable[[Pieces], Callable[[Tensor], Tensor]], digest: str
) -> Streamed:
    """A recipe that changes each element of ``piece``; ``beside``: what ``begin`` reads."""
    return Streamed(inputs([piece, *beside]), piece.rows, begin, digest + _rows([piece, *beside]))


def stream(used: Sequence[Piece], read: Pieces) -> Iterator[Tensor]:
    """The elements of all pieces, one after the other."""
    return chain.from_iterable(read(piece.source, piece.rows) for piece in used)


def passed_on(name: str, piece: Piece, wanted: str | None) -> OutTensor:
    """The piece under ``name``, cast where ``wanted`` says so."""
    code = cast_code(piece.dtype, wanted)
    if piece.rows is None and code == piece.dtype:
        return OutTensor(name, piece.shape, code, Verbatim(piece.source), piece.source)
    recipe = computed([piece], lambda xs: xs[0], "rows" if piece.rows else "cast", torch_dtype(code))
    return OutTensor(name, piece.shape, code, recipe, piece.source)


def _parts(name: str, header: Header, found: Match) -> Iterator[tuple[str, Piece]]:
    whole = Piece(header.name, header.shape, header.dtype)
    fused = next((part for part in (".qkv_proj.", ".gate_up_proj.") if part in name), None)
    if not found.family.fused or fused is None:
        yield name, whole
        return
    c = found.config
    if fused == ".gate_up_proj.":
        sizes = {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}
    else:
        width = head_dim(c)
        kv = c.num_key_value_heads * width
        sizes = {"q_proj": c.num_attention_heads * width, "k_proj": kv, "v_proj": kv}
    if header.shape[0] != sum(sizes.values()):
        detail = f"has {header.shape[0]} rows, the config says {sum(sizes.values())}"
        raise errors.UnexpectedTensor(
            folder=header.file.parent, name=name, detail=detail, remedy="check that config.json belongs to it"
        )
    begin = 0
    for part, rows in sizes.items():
        shape = (rows, *header.shape[1:])
        yield name.replace(fused, f".{part}."), Piece(header.name, shape, header.dtype, (begin, begin + rows))
        begin += rows
