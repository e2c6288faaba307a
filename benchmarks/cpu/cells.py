"""Which blocks ``benchmarks.cpu_moe`` measures: published shapes scaled to a CPU, as stock transformers modules."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
DTYPES = ("float32", "bfloat16")
FORWARD, TRAIN = MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """A gated MoE block: widths D and F (of one expert), E experts, K of them a token; ``family`` in transformers."""

    name: str
    family: str
    D: int
    F: int
    E: int
    K: int

    @property
    def expert_elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.D * self.F

    def config(self) -> transformers.PreTrainedConfig:
        """The family's configuration with these widths; ``qwen3_moe`` renormalises its top-k."""
        given = {
            "olmoe": {"intermediate_size": self.F, "num_experts": self.E},
            "qwen3_moe": {"moe_intermediate_size": self.F, "num_experts": self.E, "norm_topk_prob": True},
            "mixtral": {"intermediate_size": self.F, "num_local_experts": self.E},
        }[self.family]
        config = transformers.AutoConfig.for_model(self.family, hidden_size=self.D, num_experts_per_tok=self.K, **given)
        config._experts_implementation = "grouped_mm"
        return config


SHAPES = (
    Shape("olmoe", "olmoe", D=1024, F=512, E=32, K=4),
    Shape("qwen3-moe", "qwen3_moe", D=1024, F=384, E=64, K=4),
    Shape("mixtral", "mixtral", D=512, F=1792, E=8, K=2),
    Shape("fine-grained", "qwen3_moe", D=512, F=256, E=128, K=8),
)
#: To try the command in seconds.
TINY = Shape("tiny", "olmoe", D=32, F=16, E=4, K=2)


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    shape: Shape
    tokens: int
    dtype: torch.dtype
    train: bool

    @property
    def flops(self) -> int:
        """Useful FLOPs of the experts; a backward pass counts twice its forward pass."""
        return 2 * self.shape.expert_elements * self.tokens * self.shape.K * (3 if self.train else 1)

    @property
    def active_bytes(self) -> float:
        """Bytes of the weights of the experts that random tokens reach, on average; exact at T = 1."""
        E, K = self.shape.E, self.shape.K
        active = E * (1 - (1 - K / E) ** self.tokens)
        return active * self.shape.expert_elements * self.dtype.itemsize

    @property
    def pair_bytes(self) -> int:
        """Bytes of the weights that ``batched_mm`` gathers: those of every (token, expert) pair."""
        return self.tokens * self.shape.K * self.shape.expert_elements * self.dtype.itemsize


def block(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """The family's sparse MoE block with random weights; router logits of about 1: a router that chooses."""
    module = import_module(f"transformers.models.{shape.family}.modeling_{shape.family}")
    name = {"olmoe": "Olmoe", "qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral"}[shape.family] + "SparseMoeBlock"
    torch.manual_seed(0)
    found: nn.Module = getattr(module, name)(shape.config())
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return found.to(dtype)


def clone(original: nn.Module, experts: str) -> nn.Module:
    """A copy with its own weights and another of HF's experts implementations."""
    copied = copy.deepcopy(original)
    set_experts(copied, experts)
    return copied


def set_experts(module: nn.Module, experts: str) -> None:
    """Choose among HF's ``eager``, ``batched_mm`` and ``grouped_mm`` in a block that no model holds."""
    configs: list[Any] = [m.config for m in module.modules() if hasattr(m, "config")]
    for config in configs:
        config._experts_implementation = experts


def inputs(cell: Cell) -> tuple[Tensor, Tensor]:
    """``x`` [1, T, D], which requires a gradient where the cell trains, and the gradient of the output."""
    generator = torch.Generator().manual_seed(cell.tokens)
    x, dy = (torch.randn(1, cell.tokens, cell.shape.D, generator=generator).to(cell.dtype) for _ in range(2))
    return x.requires_grad_(cell.train), dy
