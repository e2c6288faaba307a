"""One all-to-all of exactly the rows that are wanted elsewhere.

Contract
    in    x_TD and for each of its T*K pairs the bin it is for: rank g of the group has bins g*B .. (g+1)*B-1, any other
          number is nobody's
    out   ``Sent``: the rows that arrived, with their bins 0..B-1 (B: nobody's), and the way back
    cost  each routed row crosses a link once; before it P*B counts, which the host reads (uneven splits are arguments)
    One copy of the rows (into the order of the bins), one at the way back (into that of the tokens).
Pairs of nobody stay on their rank, behind its own rows: so every rank sends all of its T*K rows, and what it sends and
gets back has a size known beforehand.
Source: torchtitan, MegaBlocks; offsets as in MaxText (reference/moe-systems.md 4.6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moepass import _compat
from moepass.kernels.rows import gather
from moepass.kernels.sorting import sort_by_expert
from moepass.lowering.ep.collectives import Group, all_to_all


@dataclass(frozen=True)
class Sent:
    """Rows at their destination.

    ``x_SD``     in the order of the senders, and of the bins for each sender
    ``bin_S``    int64 bin of each row; B: of nobody
    ``extra_S``  what was sent along, or None
    ``back``     a function from ``[S, D]`` to ``[T*K, D]``: results to the senders, zero for pairs of nobody
    """

    x_SD: Tensor
    bin_S: Tensor
    extra_S: Tensor | None
    back: Callable[[Tensor], Tensor]


def send(x_TD: Tensor, bin_TK: Tensor, bins: int, group: Group, extra_TK: Tensor | None = None) -> Sent:
    """Exchange rows; ``extra_TK`` (no gradient) travels with them."""
    (T, K), R = bin_TK.shape, bin_TK.numel()
    order_R, inverse_R, offsets = sort_by_expert(_nobody_stays(bin_TK, bins, group), group.size * bins + 1)
    wanted_GB, nobody = _counts(offsets, bins, group)
    each = [bins] * group.size
    arriving_GB = _compat.all_to_all(wanted_GB.reshape(-1), each, each, group.name).view(group.size, bins)
    there, back = _splits(wanted_GB, arriving_GB, nobody, R, group)
    x_RD = gather(x_TD, order_R // K, inverse_R.view(T, K))
    x_SD = all_to_all(x_RD, back, there, group)
    extra_S = None
    if extra_TK is not None:
        extra_S = _compat.all_to_all(extra_TK.detach().reshape(-1)[order_R], back, there, group.name)

    def returned(y_SD: Tensor) -> Tensor:
        return gather(all_to_all(y_SD, there, back, group), inverse_R, order_R)

    return Sent(x_SD, _arrived(arriving_GB, nobody, x_SD.shape[0], group), extra_S, returned)


def _nobody_stays(bin_TK: Tensor, bins: int, group: Group) -> Tensor:
    """Bins with one more behind the own ones, for the pairs of nobody."""
    own_end = (group.rank + 1) * bins
    inside = (bin_TK >= 0) & (bin_TK < group.size * bins)
    return torch.where(inside, bin_TK + (bin_TK >= own_end), own_end)


def _counts(offsets: Tensor, bins: int, group: Group) -> tuple[Tensor, Tensor]:
    """Rows for each rank's bins ``[G, B]``, and of nobody ``[1]``; int64."""
    ends = offsets.long()
    count = ends - torch.cat([ends.new_zeros(1), ends[:-1]])
    own_end = (group.rank + 1) * bins
    wanted_GB = torch.cat([count[:own_end], count[own_end + 1 :]]).view(group.size, bins)
    return wanted_GB, count[own_end : own_end + 1]


def _splits(
    wanted_GB: Tensor, arriving_GB: Tensor, nobody: Tensor, R: int, group: Group
) -> tuple[list[int], list[int]]:
    """Rows to and from every rank, by one host read; those to add up to R, also as symbols."""
    own_G = (torch.arange(group.size, device=nobody.device) == group.rank) * nobody
    read = _compat.host_sizes(torch.cat([wanted_GB.sum(1) + own_G, arriving_GB.sum(1) + own_G]))
    *there, _ = read[: group.size]
    return [*there, R - sum(there)], read[group.size :]


def _arrived(arriving_GB: Tensor, nobody: Tensor, S: int, group: Group) -> Tensor:
    """The bin of every row that arrived."""
    bins = arriving_GB.shape[1]
    own_G = (torch.arange(group.size, device=nobody.device) == group.rank) * nobody
    ends = torch.cat([arriving_GB, own_G.unsqueeze(1)], 1).reshape(-1).cumsum(0)
    place_S = torch.searchsorted(ends, torch.arange(S, device=ends.device), right=True)
    return place_S % (bins + 1)
