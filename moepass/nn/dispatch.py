"""Which pairs a dispatch policy drops before the experts run: it writes the sentinel E into the index.

Contract
    in    index_TK int32 or int64 (a pair outside ``0..E-1`` is dropped already and takes no room), weight_TK
    out   the index with E where a pair is dropped, and how many were: static shapes, no host synchronisation
    The lowerings do not compute such pairs and give their weights a zero gradient (``moepass.ops.experts``).
    ``scope="batch"`` capacity is also what the op's own ``capacity_factor`` does: both agree, and twice is as once.
Source: capacity per sequence, MaxText ``generate_masks``; by probability, Megatron-Core; ragged buffer, MaxText's
``ragged_buffer_factor`` with the clamp of its later versions, counted on the device as none of them does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moepass.kernels.sorting import rank_in_group
from moepass.spec import DispatchSpec, capacity


class Dropped(NamedTuple):
    """``index_TK`` with E where the pair is not computed; ``dropped`` (0-dim int64) counts the pairs dropped here."""

    index_TK: Tensor
    dropped: Tensor


def drop(
    index_TK: Tensor,
    weight_TK: Tensor,
    num_experts: int,
    spec: DispatchSpec,
    sequences: tuple[int, int] | None = None,
) -> Dropped:
    """Apply capacity, counted in each of the scope's windows, then the ragged buffer's clamp.

    ``sequences=(B, S)`` with T = B*S, tokens of a sequence side by side.  Raises as ``DispatchSpec.windows``.
    """
    T, K = index_TK.shape
    if T == 0:
        return Dropped(index_TK, torch.zeros((), dtype=torch.int64, device=index_TK.device))
    expert_R = _experts(index_TK, num_experts)
    kept_R = expert_R < num_experts
    before = kept_R.sum()
    if spec.capacity_factor is not None:
        _, L = spec.windows(T, sequences)
        C = capacity(spec.capacity_factor, L, K, num_experts)
        window_R = (torch.arange(T, device=index_TK.device) // L).unsqueeze(1).expand(T, K).reshape(-1)
        weight_R = weight_TK.detach().reshape(-1) if spec.drop_policy == "probability" else None
        kept_R = kept_R & (rank_in_group(window_R * (num_experts + 1) + expert_R, weight_R) < C)
    if spec.ragged_buffer_factor is not None:
        order_R = torch.argsort(torch.where(kept_R, expert_R, num_experts), stable=True)
        kept_R = kept_R & (_inverse(order_R) < math.ceil(spec.ragged_buffer_factor * T * K))
    return Dropped(torch.where(kept_R.view(T, K), index_TK, num_experts), before - kept_R.sum())


def _experts(index_TK: Tensor, E: int) -> Tensor:
    """Each pair's expert, E where it has none, in int64."""
    expert_R = index_TK.reshape(-1).long()
    return torch.where((expert_R < 0) | (expert_R > E), E, expert_R)


def _inverse(order_R: Tensor) -> Tensor:
    """The position of each row in an order."""
    return torch.empty_like(order_R).scatter(0, order_R, torch.arange(order_R.shape[0], device=order_R.device))
