"""One all-to-all of blocks of fixed size: no host synchronisation, rows that find no room are dropped and counted.

Contract
    in    as ``lowering.ep.exact``, and C: how many rows go to each rank of the group, from every rank the same
    out   ``Sent`` with G*C rows; empty places are of nobody
    which ``kept_R``: pairs beyond the first C for a rank are dropped, in the sender's order: by bin, then by token
    cost  G*C rows cross the links and are kept, whatever the routing
Collectives that need no sizes from the host move equal blocks: the buffer of a rank is one block for each sender, and
the clamp acts in each block by itself.  ``block`` with a factor of min(P, E/K) or more never drops anything.
Source: MaxText's ragged buffer and its worst case (reference/moe-systems.md 4.6); Tutel for the equal blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moepass import _compat
from moepass.kernels.rows import gather
from moepass.kernels.sorting import rows_of_slots, sort_by_expert
from moepass.lowering.ep.collectives import Group, all_to_all
from moepass.lowering.ep.exact import Sent


class Clamped(NamedTuple):
    """What was sent, and which of the R pairs were."""

    sent: Sent
    kept_R: Tensor


def block(factor: float, T: int, K: int, ranks: int) -> int:
    """C: ``ceil(factor*T*K/ranks)`` rows, no less than 1."""
    return max(1, math.ceil(factor * T * K / ranks))


def send(x_TD: Tensor, bin_TK: Tensor, bins: int, group: Group, C: int, extra_TK: Tensor | None = None) -> Clamped:
    """Exchange blocks of C rows; ``extra_TK`` (no gradient) travels with them."""
    (T, K), G = bin_TK.shape, group.size
    bin_R = bin_TK.reshape(-1)
    _, place_R, ends = sort_by_expert(bin_TK, G * bins)
    start_G = torch.cat([ends.new_zeros(1), ends[bins - 1 :: bins][:-1]])
    inside_R = (bin_R >= 0) & (bin_R < G * bins)
    rank_R = torch.where(inside_R, bin_R, 0) // bins
    within_R = place_R - start_G[rank_R]
    kept_R = inside_R & (within_R < C)
    slot_R = torch.where(kept_R, rank_R * C + within_R, 0)
    row_S, filled_S = rows_of_slots(slot_R, kept_R, G * C)
    x_SD = gather(x_TD, row_S // K, slot_R.view(T, K), valid=filled_S, back_valid=kept_R.view(T, K))
    each = [C] * G
    bin_S = torch.where(filled_S, bin_R[row_S] % bins, bins)
    extra_S = None if extra_TK is None else extra_TK.detach().reshape(-1)[row_S]

    def returned(y_SD: Tensor) -> Tensor:
        return gather(all_to_all(y_SD, each, each, group), slot_R, row_S, valid=kept_R, back_valid=filled_S)

    sent = Sent(
        all_to_all(x_SD, each, each, group),
        _compat.all_to_all(bin_S, each, each, group.name),
        None if extra_S is None else _compat.all_to_all(extra_S, each, each, group.name),
        returned,
    )
    return Clamped(sent, kept_R)
