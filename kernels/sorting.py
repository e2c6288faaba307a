"""Routing metadata: the order of the routed rows by expert, without a host synchronisation.

``moepass::sort_by_expert(index_TK, E) -> (order_R, inverse_R, offsets_E)``
    ``order_R``    routed rows (t*K + k) sorted by expert; stable, so tokens stay in order within an expert
    ``inverse_R``  position of each routed row in that order
    ``offsets_E``  int32 end of each expert's rows (what ``F.grouped_mm`` calls ``offs``)

A pair whose index lies outside ``0..E-1`` is not computed: it sorts behind the experts' rows, no offset counts it, and
its ``inverse`` is the last position, a row that ``grouped_linear`` leaves zero.  One zero row serves all such pairs, so
that the others pay for no mask.

CPU: two passes over the rows in our C++ (``kernels.cpu``); elsewhere, and without it, PyTorch's stable sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepass.kernels.cpu import grouped as own

library = torch.library.Library("moepass", "FRAGMENT")
library.define("sort_by_expert(Tensor index_TK, int E) -> (Tensor, Tensor, Tensor)")


def _sort_by_expert(index_TK: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    expert_R = index_TK.reshape(-1)
    sorted_R, order_R = torch.sort(torch.where(expert_R < 0, E, expert_R), stable=True)
    experts_E = torch.arange(E, dtype=sorted_R.dtype, device=sorted_R.device)
    offsets_E = torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)
    R = order_R.numel()
    position_R = torch.arange(R, device=order_R.device)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.where(position_R < offsets_E[-1], position_R, R - 1)
    return order_R, inverse_R, offsets_E


def _sort_by_expert_cpu(index_TK: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    return own.sort(index_TK, E) if own.sorts(index_TK) else _sort_by_expert(index_TK, E)


def _fake(index_TK: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    R = index_TK.numel()
    return (
        index_TK.new_empty(R, dtype=torch.int64),
        index_TK.new_empty(R, dtype=torch.int64),
        index_TK.new_empty(E, dtype=torch.int32),
    )


library.impl("sort_by_expert", _sort_by_expert, "CompositeExplicitAutograd")
library.impl("sort_by_expert", _sort_by_expert_cpu, "CPU")
torch.library.register_fake("moepass::sort_by_expert", _fake, lib=library)


def sort_by_expert(index_TK: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(order_R, inverse_R, offsets_E)`` of a ``[T, K]`` assignment (int32 or int64) to E experts."""
    order_R, inverse_R, offsets_E = torch.ops.moepass.sort_by_expert(index_TK, E)
    return order_R, inverse_R, offsets_E


def rank_in_group(key_R: Tensor, priority_R: Tensor | None = None) -> Tensor:
    """How many rows of the same key come before each row: in order, or by descending priority with ties in order.

    ``key_R`` integers of any value; int64 ``[R]``, by stable sorts, without a host synchronisation.
    """
    if priority_R is None:
        order_R = torch.argsort(key_R, stable=True)
    else:
        by_priority_R = torch.argsort(priority_R, descending=True, stable=True)
        order_R = by_priority_R[torch.argsort(key_R[by_priority_R], stable=True)]
    sorted_R = key_R[order_R]
    start_R = torch.searchsorted(sorted_R, sorted_R)  # where each row's key begins
    return torch.empty_like(order_R).scatter(0, order_R, torch.arange(key_R.shape[0], device=key_R.device) - start_R)


def rows_of_slots(slot_R: Tensor, kept_R: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """The inverse table: which routed row fills each of the S slots (0 where none), and whether one does."""
    R = slot_R.shape[0]
    target_R = torch.where(kept_R, slot_R, S)  # dropped rows share a dump slot behind the end
    rows_S = slot_R.new_full((S + 1,), R).scatter(0, target_R, torch.arange(R, device=slot_R.device))[:S]
    filled_S = rows_S < R
    return torch.where(filled_S, rows_S, 0), filled_S
