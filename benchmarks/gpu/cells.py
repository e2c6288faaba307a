"""What is measured: the expert blocks of real models, over T, routing and mode, with their operands.

Letters: T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Exponent of the skewed routing: expert i is drawn with a probability proportional to (i+1)**-1 (Zipf).
SKEW = 1.0


@dataclass(frozen=True)
class Shape:
    """The experts of one model: gated (SwiGLU), bfloat16 unless said otherwise."""

    name: str
    D: int
    F: int
    E: int
    K: int
    trains: bool = True  # False: the weights and their gradients would not fit beside each other

    @property
    def weight_elements(self) -> int:
        """Elements of one expert's matrices: 3*D*F."""
        return 3 * self.D * self.F


#: Source: the models' published configurations.
SHAPES = (
    Shape("qwen3-30b-a3b", 2048, 768, 128, 8),
    Shape("olmoe", 2048, 1024, 64, 8),
    Shape("mixtral", 4096, 14336, 8, 2),
    Shape("deepseek-v3", 7168, 2048, 256, 8, trains=False),
)
#: For a machine without an accelerator, and for tests: the same ways through the code, in seconds.
SMALL = (Shape("small", 64, 32, 8, 2),)
TOKENS = (32768, 512, 1, 4096, 64, 8)


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    shape: Shape
    tokens: int
    train: bool
    routing: str  # "random" or "skewed"

    @property
    def mode(self) -> str:
        """As results call it."""
        return "forward+backward" if self.train else "forward"

    @property
    def flops(self) -> float:
        """Useful FLOPs: 2 per weight and routed row, and twice that backward."""
        return (3 if self.train else 1) * 2.0 * self.shape.weight_elements * self.tokens * self.shape.K

    def floor_bytes(self, active: int, itemsize: int) -> float:
        """Bytes that must move: the active experts' weights, tokens in and out; backward: weights again, dW written."""
        weights = active * self.shape.weight_elements
        if self.train:
            weights = 2 * weights + self.shape.E * self.shape.weight_elements
        return float((weights + (2 + 4 * self.train) * self.tokens * self.shape.D) * itemsize)


def grid(shapes: tuple[Shape, ...], tokens: tuple[int, ...], routings: tuple[str, ...]) -> Iterator[Cell]:
    """The cells of a shape together (they share weights and compiled code), those with a target first."""
    for shape in shapes:
        for routing in routings:
            for train in (False, True)[: 1 + shape.trains]:
                for T in tokens:
                    yield Cell(shape, T, train, routing)


def weights(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """``w_in [E, 2F, D]`` and ``w_out [E, D, F]``, uniform, of the scale of trained layers."""
    draw = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).uniform_(-1, 1, generator=draw).mul_(size[-1] ** -0.5)

    return random(shape.E, 2 * shape.F, shape.D), random(shape.E, shape.D, shape.F)


@functools.lru_cache(maxsize=4)
def tokens_and_scores(cell: Cell, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """``x_TD``, and ``score_TE`` (float32), whose K largest are a token's experts."""
    shape, draw = cell.shape, torch.Generator(device).manual_seed(1)
    x_TD = torch.randn(cell.tokens, shape.D, device=device, generator=draw).to(dtype)
    score_TE = torch.rand(cell.tokens, shape.E, device=device, generator=draw)
    if cell.routing == "skewed":  # Gumbel top-k: K draws without replacement, by popularity
        rank_E = torch.arange(1, shape.E + 1, device=device, dtype=torch.float32)
        score_TE = -SKEW * rank_E.log() - (-score_TE.clamp(1e-9, 1 - 1e-7).log()).log()
    return x_TD, score_TE


def route(score_TE: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """``index_TK`` (int64, distinct) and ``weight_TK`` (float32, sums to 1): the same few kernels for every side."""
    value_TK, index_TK = score_TE.topk(K, dim=-1)
    return index_TK, value_TK.softmax(-1)


def leaves(cell: Cell, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """``tokens_and_scores`` as leaves that need gradients where the cell trains; T alone is dynamic for compilers."""
    x_TD, score_TE = (t.detach().requires_grad_(cell.train) for t in tokens_and_scores(cell, dtype, device))
    for tensor in (x_TD, score_TE):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return x_TD, score_TE
