"""One all-to-all of blocks of fixed size: no host synchronisation, rows that find no room are dropped and counted.

Contract
    in    as ``lowering.ep.exact``, and C: how many rows go to each rank of the group, from every rank the same
    out   as ``lowering.ep.exact`` with G*C rows; empty places are of nobody
    which ``kept_R``: pairs beyond the first C for a rank are dropped, in the sender's order: by bin, then by token
    cost  G*C rows cross the links and are kept, whatever the routing
Collectives that need no sizes from the host move equal blocks: the buffer of a rank is one block for each sender, and
the clamp acts in each block by itself.  ``block`` with a factor of min(P, E/K) or more never drops anything.
Source: MaxText's ragged buffer and its worst case (reference/moe-systems.md 4.6); Tutel for the equal blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moepass.kernels.rows import gather
from moepass.kernels.sorting import rows_of_slots, sort_by_expert
from moepass.lowering.ep.collectives import Group, Pending, begin_all_to_all
from moepass.lowering.ep.exact import Arrived, Wait


@dataclass(frozen=True)
class Leaving:
    """Blocks under way; ``kept_R`` says which of the R pairs found room, ``slot_R`` where."""

    x_SD: Pending
    bin_S: Pending
    extra_S: Pending | None
    slot_R: Tensor
    kept_R: Tensor
    row_S: Tensor
    filled_S: Tensor
    C: int
    group: Group

    def wait(self) -> Arrived:
        """They have come."""
        extra_S = None if self.extra_S is None else self.extra_S.wait()
        return Arrived(self.x_SD.wait(), self.bin_S.wait(), extra_S)

    def begin_back(self, y_SD: Tensor) -> Wait:
        """Results to their senders: ``[S, D] -> [T*K, D]``, zero for pairs that found no room."""
        each = [self.C] * self.group.size
        pending = begin_all_to_all(y_SD, each, each, self.group)
        return lambda: gather(pending.wait(), self.slot_R, self.row_S, valid=self.kept_R, back_valid=self.filled_S)


def block(factor: float, T: int, K: int, ranks: int) -> int:
    """C: ``ceil(factor*T*K/ranks)`` rows, no less than 1."""
    return max(1, math.ceil(factor * T * K / ranks))


def begin(x_TD: Tensor, bin_TK: Tensor, bins: int, group: Group, C: int, extra_TK: Tensor | None = None) -> Leaving:
    """Send blocks of C rows; ``extra_TK`` (no gradient) travels with them."""
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
    return Leaving(
        x_SD=begin_all_to_all(x_SD, each, each, group),
        bin_S=begin_all_to_all(bin_S, each, each, group),
        extra_S=None if extra_S is None else begin_all_to_all(extra_S, each, each, group),
        slot_R=slot_R, kept_R=kept_R, row_S=row_S, filled_S=filled_S, C=C, group=group,
    )  # fmt: skip
