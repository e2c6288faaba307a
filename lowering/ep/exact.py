"""One all-to-all of exactly the rows that are wanted elsewhere.

Contract
    in    x_TD and for each of its T*K pairs the bin it is for: rank g of the group has bins g*B .. (g+1)*B-1, any other
          number is nobody's
    out   ``Arrived``: the rows, with their bins 0..B-1 (B: nobody's); ``Route.begin_back`` sends results home
    cost  each routed row crosses a link once; before it P*B counts, which the host reads (uneven splits are arguments);
          all chunks of the tokens share that exchange and that read
    One copy of the rows (into the order of the bins), one at the way back (into that of the tokens).
Pairs of nobody stay on their rank, behind its own rows: so every rank sends all of its T*K rows, and what it sends and
gets back has a size known beforehand.
Source: torchtitan, MegaBlocks; offsets as in MaxText (reference/moe-systems.md 4.6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepass import _compat
from moepass.kernels.rows import gather
from moepass.kernels.sorting import sort_by_expert
from moepass.lowering.ep.collectives import Group, Pending, begin_all_to_all

#: Waits for what is under way and puts it where it belongs.
Wait = Callable[[], Tensor]


@dataclass(frozen=True)
class Arrived:
    """Rows at their destination.

    ``x_SD``     in the order of the senders, and of the bins for each sender
    ``bin_S``    int64 bin of each row; B: of nobody
    ``extra_S``  what was sent along, or None
    """

    x_SD: Tensor
    bin_S: Tensor
    extra_S: Tensor | None


@dataclass(frozen=True)
class Leaving:
    """Rows under way."""

    x_SD: Pending
    extra_S: Pending | None
    bin_S: Callable[[int], Tensor]

    def wait(self) -> Arrived:
        """They have come."""
        x_SD = self.x_SD.wait()
        extra_S = None if self.extra_S is None else self.extra_S.wait()
        return Arrived(x_SD, self.bin_S(x_SD.shape[0]), extra_S)


@dataclass(frozen=True)
class _Sorted:
    """T*K pairs by bin, those of nobody behind the own ones: their order and its inverse, and the counts."""

    order_R: Tensor
    inverse_R: Tensor
    K: int
    wanted_GB: Tensor
    nobody: Tensor


@dataclass(frozen=True)
class Route:
    """Where the pairs of some tokens go, known to the host: rows to (``there``) and from (``home``) every rank."""

    by_bin: _Sorted
    arriving_GB: Tensor
    there: list[int]
    home: list[int]
    group: Group

    def begin(self, x_TD: Tensor, extra_TK: Tensor | None = None) -> Leaving:
        """Send the rows; ``extra_TK`` (no gradient) travels with them."""
        order_R, inverse_R, K = self.by_bin.order_R, self.by_bin.inverse_R, self.by_bin.K
        x_RD = gather(x_TD, order_R // K, inverse_R.view(x_TD.shape[0], K))
        extra = None
        if extra_TK is not None:
            extra = begin_all_to_all(extra_TK.detach().reshape(-1)[order_R], self.home, self.there, self.group)
        return Leaving(begin_all_to_all(x_RD, self.home, self.there, self.group), extra, self._bins)

    def begin_back(self, y_SD: Tensor) -> Wait:
        """Results to their senders: ``[S, D] -> [T*K, D]``, zero for pairs of nobody."""
        pending = begin_all_to_all(y_SD, self.there, self.home, self.group)
        return lambda: gather(pending.wait(), self.by_bin.inverse_R, self.by_bin.order_R)

    def _bins(self, S: int) -> Tensor:
        """The bin of every row that arrives."""
        bins = self.arriving_GB.shape[1]
        own_G = _own(self.by_bin.nobody, self.group)
        ends = torch.cat([self.arriving_GB, own_G.unsqueeze(1)], 1).reshape(-1).cumsum(0)
        place_S = torch.searchsorted(ends, torch.arange(S, device=ends.device), right=True)
        return place_S % (bins + 1)


def routes(bins_TK: Sequence[Tensor], bins: int, group: Group) -> list[Route]:
    """A route for each chunk of pairs, by one exchange of counts and one host read."""
    chunks = [_sorted(bin_TK, bins, group) for bin_TK in bins_TK]
    wanted_GCB = torch.stack([chunk.wanted_GB for chunk in chunks], 1)
    each = [len(chunks) * bins] * group.size
    arriving_GCB = _compat.all_to_all(wanted_GCB.reshape(-1), each, each, group.name).view_as(wanted_GCB)
    own_CG = torch.stack([_own(chunk.nobody, group) for chunk in chunks])
    leaving_CG, coming_CG = wanted_GCB.sum(2).T + own_CG, arriving_GCB.sum(2).T + own_CG
    read = _compat.host_sizes(torch.stack([leaving_CG, coming_CG], 1).reshape(-1))
    found = []
    for c, chunk in enumerate(chunks):
        at = 2 * c * group.size
        *there, _ = read[at : at + group.size]
        there.append(chunk.order_R.shape[0] - sum(there))  # they add up to R, also as symbols
        home = read[at + group.size : at + 2 * group.size]
        found.append(Route(chunk, arriving_GCB[:, c], there, home, group))
    return found


def _sorted(bin_TK: Tensor, bins: int, group: Group) -> _Sorted:
    order_R, inverse_R, offsets = sort_by_expert(_nobody_stays(bin_TK, bins, group), group.size * bins + 1)
    return _Sorted(order_R, inverse_R, bin_TK.shape[1], *_counts(offsets, bins, group))


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


def _own(nobody: Tensor, group: Group) -> Tensor:
    """Rows of nobody that each rank gets of this one: all stay here."""
    return (torch.arange(group.size, device=nobody.device) == group.rank) * nobody
