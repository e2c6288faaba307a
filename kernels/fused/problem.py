"""What the fused kernels are asked to compute, and on what: frozen values that decide every launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

#: Triton's names of the dtypes that the kernels take.
TRITON_TYPES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "int32": "i32",
    "int64": "i64",
}
Strides = tuple[int, int, int]
#: Bytes of an element.
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def contiguous_strides(D: int, F: int, n: int, *, transposed: bool = False) -> tuple[Strides, Strides]:
    """Strides of ``w_in [E, n*F, D]`` and ``w_out [E, D, F]``; ``transposed``: views of [E, D, n*F] and [E, F, D]."""
    rows = n * F
    if transposed:
        return (rows * D, 1, rows), (D * F, 1, D)
    return (rows * D, D, 1), (D * F, F, 1)


class Needs(NamedTuple):
    """Which gradients a backward pass has to give."""

    x: bool = True
    weight: bool = True
    w_in: bool = True
    w_out: bool = True
    b_in: bool = False
    b_out: bool = False


@dataclass(frozen=True)
class Problem:
    """One MoE block.

    ``tokens``      T that the tiles are chosen for; the launches serve any T
    ``n``           input projections: 2 for gate and up, 1 ungated
    ``w_in``        strides, in elements, of ``[E, n*F, D]``; ``w_out`` of ``[E, D, F]``: transposed layouts are strides
    ``interleaved`` gate and up rows alternate in ``w_in`` and ``b_in``
    ``save``        keep the pre-activations for the backward pass, which recomputes them otherwise
    ``aligned``     ``w_in`` and ``w_out`` start at multiples of 16 bytes
    """

    tokens: int
    D: int
    F: int
    E: int
    K: int
    n: int
    dtype: str
    activation: str
    w_in: tuple[int, int, int]
    w_out: tuple[int, int, int]
    bias_in: bool = False
    bias_out: bool = False
    interleaved: bool = False
    save: bool = False
    index_dtype: str = "int64"
    weight_dtype: str = "float32"
    aligned: bool = True

    @property
    def rows_per_expert(self) -> float:
        """Routed rows over the experts that can have any."""
        R = self.tokens * self.K
        return R / max(1, min(self.E, R))

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x."""
        return ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Target:
    """What is compiled for: the constants that tile choices depend on.

    ``shared``  bytes of shared memory that a block may use; ``warp``: threads of a warp
    """

    name: str
    sms: int
    shared: int
    warp: int = 32
    interpreter: bool = False


#: The targets that are compiled ahead of time.  NVIDIA: CUDA C programming guide, compute capabilities; AMD: CDNA3 ISA.
TARGETS = {
    "sm_80": Target("sm_80", sms=108, shared=166912),
    "sm_90": Target("sm_90", sms=132, shared=232448),
    "sm_100": Target("sm_100", sms=148, shared=232448),
    "gfx942": Target("gfx942", sms=304, shared=65536, warp=64),
}
INTERPRETER = Target("interpreter", sms=1, shared=232448, interpreter=True)


class Tile(NamedTuple):
    """Sizes of one kernel's block: ``m x n`` of the result, ``k`` of the contraction at a time.

    ``group``       M-tiles that are walked together over all N-tiles, so that a panel of weights is reused from L2
    ``persistent``  programs per SM that walk all the tiles between them; 0: a program per tile.  Not for ``dw``: its
                    tiles take as long as their experts have rows, which the hardware's queue evens out
    ``tma``         what TMA descriptors fetch where that is legal (``tma.level``): 0 nothing, 1 weights, 2 rows as well
    ``weigh``       of ``down`` alone: rows leave it times their routing weights, so that combine only sums
    """

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    group: int = 8
    persistent: int = 0
    tma: int = 0
    weigh: bool = False


class Tiles(NamedTuple):
    """A tile per GEMM.  ``up`` and ``down`` share the forward's row tiles, ``hidden`` and ``dx`` the backward's."""

    up: Tile
    down: Tile
    hidden: Tile
    dx: Tile
    dw: Tile
