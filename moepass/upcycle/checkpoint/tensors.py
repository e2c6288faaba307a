"""What a checkpoint holds and what is to be written: the vocabulary of this package, no I/O.

``Header``     a tensor of the source: where its bytes are
``OutTensor``  a tensor of the output with its recipe: ``Verbatim`` (bytes as they are), ``Computed`` (arithmetic) or
               ``Streamed`` (arithmetic on each element, some at a time)
``DTYPES``     safetensors codes -> (bytes per element, name in torch)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: Codes of the safetensors format that have whole bytes per element and a torch dtype.
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "F32": (4, "float32"),
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F64": (8, "float64"),
    "C64": (8, "complex64"),
}
_CODES = {name: code for code, (_, name) in DTYPES.items()}
#: Codes of floating types that arithmetic is done in.
FLOATS = ("F64", "F32", "BF16", "F16")


def torch_dtype(code: str) -> torch.dtype:
    """torch's dtype for a code of safetensors."""
    return getattr(torch, DTYPES[code][1])  # type: ignore[no-any-return]


def dtype_code(dtype: torch.dtype) -> str | None:
    """The code of safetensors for torch's dtype; None where the format has none."""
    return _CODES.get(str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Header:
    """A tensor of the source.  Its bytes are ``file[begin:end]``, little endian, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin

    def elements(self, rows: tuple[int, int] | None) -> int:
        """How many there are in these rows; None: in all."""
        return math.prod(self.shape) if rows is None else (rows[1] - rows[0]) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Verbatim:
    """The bytes of a source tensor as they are: same dtype, same number of elements (the shape may be a reshape)."""

    source: str


@dataclass(frozen=True)
class Computed:
    """``function(*inputs) -> Tensor`` of the shape and dtype that its ``OutTensor`` promises.

    ``inputs``    names of source tensors; each call gets fresh memory or a cached tensor: do not change it in place
    ``function``  deterministic, and safe to call from several threads at once; torch itself uses one thread inside
    ``digest``    text that identifies function and parameters (method, seed, expert ...); enters the plan's hash
    """

    inputs: tuple[str, ...]
    function: Callable[..., Tensor]
    digest: str


#: ``pieces(name, rows)``: a source tensor or some of its rows, as flat tensors of ``PIECE`` elements, the last shorter.
Pieces = Callable[[str, tuple[int, int] | None], Iterator[Tensor]]
#: At most 1 MB of bfloat16 or float32: ext4 took ten times as long for writes of 2 MB as for larger or smaller ones.
PIECE = 1 << 18


@dataclass(frozen=True)
class Streamed:
    """A source tensor changed element by element; no more than a piece of it is ever in memory.

    ``inputs``  the tensor itself, then what ``begin`` may read beside it
    ``rows``    of the tensor; None: all
    ``begin``   called once for each tensor that is made; its result is called with the pieces in order, and makes of
                each, ``[n]``, the result ``[n]`` in the dtype that the ``OutTensor`` promises
    ``digest``  as in ``Computed``
    """

    inputs: tuple[str, ...]
    rows: tuple[int, int] | None
    begin: Callable[[Pieces], Callable[[Tensor], Tensor]]
    digest: str


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write.  ``group``: tensors that are made from the same inputs; keep them next to each other."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    recipe: Verbatim | Computed | Streamed
    group: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * DTYPES[self.dtype][0]
