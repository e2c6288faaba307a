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
from moepass.lowering.grouped import rows


def run_exact(given: ep.Tokens, args: ExpertArgs, settings: ep.Settings) -> Tensor:
    """``y_TD``."""
    (group,) = settings.groups
    sent = exact.send(given.x_TD, given.index_TK, args.E, group, _priority(given, args))
    return _combined(sent.back(_experts(sent, given, args, settings)), given, args.E * settings.ranks)


def run_buffered(given: ep.Tokens, args: ExpertArgs, settings: ep.Settings) -> tuple[Tensor, Tensor]:
    """``(y_TD, dropped)``; dropped counts this rank's pairs that found no room, int64 ``[]``."""
    (group,), P = settings.groups, settings.ranks
    (T, K), E = given.index_TK.shape, args.E * settings.ranks
    most = ep.most_tokens(T, settings.tokens, group, given.x_TD)
    wide = ep.padded(given, most, E)
    C = ragged.block(settings.buffer_factor, most, K, P)
    sent, kept_R = ragged.send(wide.x_TD, wide.index_TK, args.E, group, C, _priority(wide, args))
    y_RD = sent.back(_experts(sent, given, args, settings))
    kept_TK = kept_R.view_as(wide.index_TK)
    wanted = ((wide.index_TK >= 0) & (wide.index_TK < E)).sum()
    y_TD = _combined(y_RD, wide._replace(index_TK=torch.where(kept_TK, wide.index_TK, E)), E)
    return y_TD[:T], wanted - kept_R.sum()


def run_two_level(given: ep.Tokens, args: ExpertArgs, settings: ep.Settings) -> Tensor:
    """``y_TD``."""
    nodes, local = settings.groups
    to_node = exact.send(given.x_TD, given.index_TK, local.size * args.E, nodes)
    to_rank = exact.send(to_node.x_SD, to_node.bin_S.unsqueeze(1), args.E, local)
    y_SD = rows(to_rank.x_SD, to_rank.bin_S, args)
    return _combined(to_node.back(to_rank.back(y_SD)), given, args.E * settings.ranks)


def _priority(given: ep.Tokens, args: ExpertArgs) -> Tensor | None:
    """What the receiver needs to know of the routing weights."""
    return given.weight_TK if args.capacity_factor and args.drop_policy == "probability" else None


def _experts(sent: exact.Sent, given: ep.Tokens, args: ExpertArgs, settings: ep.Settings) -> Tensor:
    """Local experts on the rows that arrived, those over capacity left out."""
    bin_S = sent.bin_S
    if args.capacity_factor:
        (T, K), E = given.index_TK.shape, args.E * settings.ranks
        C = ep.capacity(args, K, E, T, settings, given.x_TD)
        bin_S = ep.within_capacity(bin_S, sent.extra_S, C, args.E)
    return rows(sent.x_SD, bin_S, args)


def _combined(y_RD: Tensor, given: ep.Tokens, E: int) -> Tensor:
    """The weighted sum over K in float32."""
    T, K = given.index_TK.shape
    weight_TK = computed_weights(given.index_TK, given.weight_TK, E)
    return combine(y_RD.view(T, K, given.x_TD.shape[1]), weight_TK, given.x_TD.dtype)
