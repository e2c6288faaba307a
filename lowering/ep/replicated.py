"""Every rank holds the same tokens and computes its own experts; the parts are summed.  For decoding.

Contract
    in    x_TD, index_TK (experts of all ranks), weight_TK, the same on every rank; this rank's experts
    out   y_TD, the same on every rank
    cost  one all-reduce of T*D elements (ring: 2*(P-1)/P of them per rank); the same again backwards, twice where the
          routing weights need a gradient (T*K elements)
    Every rank holds the loss of the same tokens, so gradients are whole on every rank: nothing is averaged here.
    Nothing is dispatched: the shared expert runs over the sum.
    no host synchronisation; static shapes
Source: the f and g of Megatron-LM (Shoeybi et al. 2019).
"""

from __future__ import annotations

from torch import Tensor

from moepass import spec
from moepass.lowering import eager
from moepass.lowering.base import ExpertArgs
from moepass.lowering.ep import settings as ep
from moepass.lowering.ep.collectives import begin_sum_of_parts, used_in_parts
from moepass.lowering.ep.schedule import Beside


def run(given: ep.Tokens, args: ExpertArgs, settings: ep.Settings, beside: Beside) -> Tensor:
    """``y_TD``."""
    (group,), P = settings.groups, settings.ranks
    x_TD, index_TK, weight_TK = given
    (T, K), E = index_TK.shape, args.E * P
    if args.capacity_factor:
        C = spec.capacity(args.capacity_factor, T, K, E)
        priority_R = weight_TK.detach().reshape(-1) if args.drop_policy == "probability" else None
        index_TK = ep.within_capacity(index_TK.reshape(-1), priority_R, C, E).view(T, K)
    local_TK = ep.local_index(index_TK, args.E, settings.rank)
    own = ep.Tokens(used_in_parts(x_TD, group), local_TK, used_in_parts(weight_TK, group))
    sums = [begin_sum_of_parts(eager.run_part(*chunk, args), group) for chunk in ep.chunks(own, settings.chunks)]
    beside()
    return ep.joined([each.wait() for each in sums])
