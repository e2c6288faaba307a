"""Routed rows travel to the ranks of their experts and back: all-to-all, local experts, all-to-all.

Contract
    in    x_TD, index_TK (experts of all ranks), weight_TK of this rank's tokens; this rank's experts
    out   y_TD of this rank's tokens; weights are applied and summed where the tokens are, in float32
    exact     T may differ by rank; the host reads the splits; each routed row crosses a link once each way
    buffered  ``buffer_factor``: blocks of fixed size, no host read, what finds no room is dropped and counted
    two_level (nodes x ranks of a node): rows first go to the node of their expert, along ranks of the same number, then
              to the rank: each crosses the slow links once, in fewer and larger messages
    Capacity is applied where the rows arrive: an expert meets the rows of all ranks in their order.
Source: GShard (Lepikhin et al. 2020); dropless as in MegaBlocks; two levels as in Tutel and HetuMoE.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moepass.kernels.rows import combine
from moepass.lowering.base import ExpertArgs, computed_weights
from moepass.lowering.ep import exact, ragged
from moepass.lowering.ep import settings as ep
from moepass.lowering.ep.schedule import Beside, Part, in_turn
from moepass.lowering.grouped import rows


def run_exact(given: ep.Tokens, args: ExpertArgs, settings: ep.Settings, beside: Beside) -> Tensor:
    """``y_TD``."""
    (group,) = settings.groups
    chunks = ep.chunks(given, settings.chunks)
    routes = exact.routes([chunk.index_TK for chunk in chunks], args.E, group)
    pairs = zip(chunks, routes, strict=True)
    return ep.joined(in_turn([_exact(chunk, route, args, settings) for chunk, route in pairs], beside))


def _exact(given: ep.Tokens, route: exact.Route, args: ExpertArgs, settings: ep.Settings) -> Part:
    leaving = route.begin(given.x_TD, _priority(given, args))
    yield
    home = route.begin_back(_experts(leaving.wait(), given, args, settings))
    yield
    return _combined(home(), given, args.E * settings.ranks)


def run_buffered(given: ep.Tokens, args: ExpertArgs, settings: ep.Settings, beside: Beside) -> tuple[Tensor, Tensor]:
    """``(y_TD, dropped)``; dropped counts this rank's pairs that found no room, int64 ``[]``."""
    T, E = given.x_TD.shape[0], args.E * settings.ranks
    lost: list[Tensor] = []
    chunks = ep.even_chunks(given, E, settings)
    y_TD = ep.joined(in_turn([_buffered(chunk, T, args, settings, lost) for chunk in chunks], beside))
    return y_TD[:T], torch.stack(lost).sum()


def _buffered(given: ep.Tokens, T: int, args: ExpertArgs, settings: ep.Settings, lost: list[Tensor]) -> Part:
    """One chunk of the T tokens; appends how many of its pairs found no room."""
    (group,), P = settings.groups, settings.ranks
    (rows, K), E = given.index_TK.shape, args.E * P
    C = ragged.block(settings.buffer_factor, rows, K, P)
    leaving = ragged.begin(given.x_TD, given.index_TK, args.E, group, C, _priority(given, args))
    yield
    home = leaving.begin_back(_experts(leaving.wait(), given, args, settings, T))
    yield
    kept_TK = leaving.kept_R.view_as(given.index_TK)
    wanted = ((given.index_TK >= 0) & (given.index_TK < E)).sum()
    lost.append(wanted - leaving.kept_R.sum())
    return _combined(home(), given._replace(index_TK=torch.where(kept_TK, given.index_TK, E)), E)


def run_two_level(given: ep.Tokens, args: ExpertArgs, settings: ep.Settings, beside: Beside) -> Tensor:
    """``y_TD``."""
    nodes, local = settings.groups
    chunks = ep.chunks(given, settings.chunks)
    routes = exact.routes([chunk.index_TK for chunk in chunks], local.size * args.E, nodes)
    pairs = zip(chunks, routes, strict=True)
    return ep.joined(in_turn([_two_level(chunk, route, args, settings) for chunk, route in pairs], beside))


def _two_level(given: ep.Tokens, to_node: exact.Route, args: ExpertArgs, settings: ep.Settings) -> Part:
    """What is inside a node is waited for at once: the links between nodes are the slow ones."""
    leaving = to_node.begin(given.x_TD)
    yield
    there = leaving.wait()
    (to_rank,) = exact.routes([there.bin_S.unsqueeze(1)], args.E, settings.groups[1])
    arrived = to_rank.begin(there.x_SD).wait()
    y_SD = to_rank.begin_back(rows(arrived.x_SD, arrived.bin_S, args))()
    home = to_node.begin_back(y_SD)
    yield
    return _combined(home(), given, args.E * settings.ranks)


def _priority(given: ep.Tokens, args: ExpertArgs) -> Tensor | None:
    """What the receiver needs to know of the routing weights."""
    return given.weight_TK if args.capacity_factor and args.drop_policy == "probability" else None


def _experts(
    arrived: exact.Arrived, given: ep.Tokens, args: ExpertArgs, settings: ep.Settings, T: int | None = None
) -> Tensor:
    """Local experts on the rows that arrived, those over capacity left out; T tokens if not those of ``given``."""
    bin_S = arrived.bin_S
    if args.capacity_factor:
        (own, K), E = given.index_TK.shape, args.E * settings.ranks
        C = ep.capacity(args, K, E, own if T is None else T, settings, given.x_TD)
        bin_S = ep.within_capacity(bin_S, arrived.extra_S, C, args.E)
    return rows(arrived.x_SD, bin_S, args)


def _combined(y_RD: Tensor, given: ep.Tokens, E: int) -> Tensor:
    """The weighted sum over K in float32."""
    T, K = given.index_TK.shape
    weight_TK = computed_weights(given.index_TK, given.weight_TK, E)
    return combine(y_RD.view(T, K, given.x_TD.shape[1]), weight_TK, given.x_TD.dtype)
