"""Assignments that ignore what the router says, for benchmarks: who computes is decided by the position alone.

Contract
    in    numbers of tokens, choices and experts; the router's weight as a seed
    out   index_TK int64 (and made-up weights float32 for ``balanced``)
    No state and no random generator: numbers are hashes of the slot and of the router's first four weights, which are
    the same in a forward, in its recomputation under activation checkpointing, in eager and compiled code, and differ
    between layers and between steps of training.
Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def uniform(T: int, K: int, E: int, device: torch.device) -> Tensor:
    """Slot j of the flattened ``[T, K]`` gets expert ``j mod E``: perfect balance (OLMo-core)."""
    return torch.arange(T * K, device=device).view(T, K) % E


def random(T: int, K: int, E: int, weight: Tensor) -> Tensor:
    """K distinct experts a token, each set equally likely.

    Megatron draws random logits likewise; MaxText draws the K experts independently, so that one may come twice.
    """
    return _top(_uniforms(T * E, weight, 0).view(T, E), K)


def balanced(T: int, K: int, E: int, weight: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Automodel's FakeBalancedGate: ``uniform`` with weights 1/K, blurred by ``noise`` in [0, 1].

    With noise v experts are the K highest of ``rand + 0.1*v*randn``, and weights ``(1-v)/K + v*rand/sum(rand)``.
    No gradient reaches the router.
    """
    if noise == 0:
        flat_TK = torch.full((T, K), 1.0 / K, device=weight.device)
        return uniform(T, K, E, weight.device), flat_TK
    normal = math.sqrt(2.0) * torch.erfinv(2.0 * _uniforms(T * E, weight, 1) - 1.0)
    index_TK = _top((_uniforms(T * E, weight, 0) + 0.1 * noise * normal).view(T, E), K)
    share_TK = _uniforms(T * K, weight, 2).view(T, K)
    return index_TK, (1.0 - noise) / K + noise * share_TK / share_TK.sum(-1, keepdim=True)


def _top(value_TE: Tensor, K: int) -> Tensor:
    return torch.sort(value_TE, dim=-1, descending=True, stable=True).indices[:, :K]


def _uniforms(count: int, weight: Tensor, stream: int) -> Tensor:
    """``count`` float32 numbers, evenly spread over the open interval (0, 1)."""
    bits = weight.detach().reshape(-1)[:4].float().view(torch.int32).long() & MASK
    rank = torch.arange(1, bits.shape[0] + 1, device=weight.device)
    seed = _mixed((_mixed((bits + rank) & MASK).sum() + stream) & MASK)
    slot = torch.arange(count, device=weight.device)
    return ((_mixed((_mixed(slot) + seed) & MASK) >> 9).float() + 0.5) * 2.0**-23


def _mixed(h: Tensor) -> Tensor:
    """A bijection of 32 bits with good avalanche (Mueller); products stay below 2^59, so nothing overflows."""
    h = ((h ^ (h >> 16)) * 0x45D9F3B) & MASK
    h = ((h ^ (h >> 16)) * 0x45D9F3B) & MASK
    return h ^ (h >> 16)
