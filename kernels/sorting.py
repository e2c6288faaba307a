"""Routing metadata: the order of the routed rows by expert, without a host synchronisation.

``moepass::sort_by_expert(index_TK, E) -> (order_R, inverse_R, offsets_E)``
    ``order_R``    routed rows (t*K + k) sorted by expert; stable, so tokens stay in order within an expert
    ``inverse_R``  position of each routed row in that order
    ``offsets_E``  int32 end of each expert's rows (what ``F.grouped_mm`` calls ``offs``)
"""

from __future__ import annotations

import torch
from torch import Tensor

library = torch.library.Library("moepass", "FRAGMENT")
library.define("sort_by_expert(Tensor index_TK, int E) -> (Tensor, Tensor, Tensor)")


def _sort_by_expert(index_TK: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    expert_R = index_TK.reshape(-1)
    order_R = torch.argsort(expert_R, stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    counts_E = torch.zeros(E, dtype=torch.int32, device=order_R.device)
    counts_E.scatter_add_(0, expert_R, torch.ones_like(expert_R, dtype=torch.int32))
    return order_R, inverse_R, counts_E.cumsum(0, dtype=torch.int32)


def _fake(index_TK: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    R = index_TK.numel()
    return (
        index_TK.new_empty(R, dtype=torch.int64),
        index_TK.new_empty(R, dtype=torch.int64),
        index_TK.new_empty(E, dtype=torch.int32),
    )


library.impl("sort_by_expert", _sort_by_expert, "CompositeExplicitAutograd")
torch.library.register_fake("moepass::sort_by_expert", _fake, lib=library)


def sort_by_expert(index_TK: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(order_R, inverse_R, offsets_E)`` of an ``[T, K]`` assignment to E experts."""
    order_R, inverse_R, offsets_E = torch.ops.moepass.sort_by_expert(index_TK, E)
    return order_R, inverse_R, offsets_E
