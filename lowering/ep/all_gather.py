"""Every rank computes its experts for the tokens of all ranks: all-gather, local experts, reduce-scatter.

Contract
    in    x_TD, index_TK (experts of all ranks), weight_TK of this rank's tokens; this rank's experts
    out   y_TD of this rank's tokens; the ranks' parts are summed in x's dtype
    cost  all-gather and reduce-scatter of (P-1)*T*D elements each, and of the routing (2*(P-1)*T*K); the same backwards
    buffers of P*T rows, T the most of any rank: others are padded with rows of nobody
    The host reads one number where T differs by rank and nobody has said its maximum.
    The order of tokens is that of the ranks, so that capacity drops what one rank with all tokens would drop.
Source: MaxText's ring of experts.
"""

from __future__ import annotations

from torch import Tensor

from moepass.lowering import eager
from moepass.lowering.base import ExpertArgs
from moepass.lowering.ep import settings as ep
from moepass.lowering.ep.collectives import begin_all_gather, begin_reduce_scatter
from moepass.lowering.ep.schedule import Beside, Part, in_turn


def run(given: ep.Tokens, args: ExpertArgs, settings: ep.Settings, beside: Beside) -> Tensor:
    """``y_TD``."""
    T = given.x_TD.shape[0]
    chunks = ep.even_chunks(given, args.E * settings.ranks, settings)
    return ep.joined(in_turn([_part(chunk, T, args, settings) for chunk in chunks], beside))[:T]


def _part(given: ep.Tokens, T: int, args: ExpertArgs, settings: ep.Settings) -> Part:
    """One chunk; ``T`` is what this rank has of all."""
    (group,), K, E = settings.groups, given.index_TK.shape[1], args.E * settings.ranks
    gathers = [begin_all_gather(t, group) for t in given]
    yield
    x_TD, index_TK, weight_TK = (gather.wait() for gather in gathers)
    if args.capacity_factor:
        C = ep.capacity(args, K, E, T, settings, given.x_TD)
        priority_R = weight_TK.detach().reshape(-1) if args.drop_policy == "probability" else None
        index_TK = ep.within_capacity(index_TK.reshape(-1), priority_R, C, E).view_as(index_TK)
    local_TK = ep.local_index(index_TK, args.E, settings.rank)
    scatter = begin_reduce_scatter(eager.run_part(x_TD, local_TK, weight_TK, args), group)
    yield
    return scatter.wait()
