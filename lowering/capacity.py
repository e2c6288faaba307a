"""Fixed-capacity dispatch: C rows for every expert, batched GEMMs, tokens over capacity lose that expert.

Contract
    in    x_TD, index_TK, weight_TK and the expert weights; a capacity factor
    out   y_TD in x's dtype; dropped assignments, and those without an expert, add nothing and get no gradient
    cost  2(n+1)*E*C*D*F FLOPs with C = max(1, ceil(cf*T*K/E)); static shapes, no host synchronisation
    padding rows are computed but never read, so biases on them reach neither outputs nor gradients
Source: GShard (Lepikhin et al. 2020), Switch Transformer (Fedus et al. 2021); index tables instead of one-hot einsums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moepass import spec
from moepass.kernels.rows import combine, gather
from moepass.kernels.sorting import rank_in_group, rows_of_slots
from moepass.lowering.base import ExpertArgs, Lowering, activate
from moepass.lowering.cost import price_capacity
from moepass.lowering.grouped import Grouped
from moepass.lowering.plan import Price, Verdict, Workload

if TYPE_CHECKING:
    from moepass.lowering.hardware import Hardware


@dataclass(frozen=True)
class FixedCapacity(Lowering):
    """See the module docstring."""

    name = "capacity"

    def legal(self, work: Workload) -> Verdict:
        """Only where the spec itself drops tokens."""
        if work.capacity_factor is None:
            return Verdict.no("dropless_spec", "the spec keeps every assignment; a fixed capacity would drop some")
        return Verdict.yes()

    def price(self, work: Workload, hw: Hardware) -> Price:
        """``cost.price_capacity``."""
        return price_capacity(work, hw)

    def computed_rows(self, load_E: Sequence[int], work: Workload) -> int:
        """C for every expert, filled or not."""
        return len(load_E) * spec.capacity(work.capacity_factor or 1.0, work.tokens, work.K, len(load_E))

    def build(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
        """Dispatch into ``[E, C, D]``, two batched GEMMs, combine."""
        T, K = index_TK.shape
        if T == 0:  # nothing to drop, and no row to fill a slot with
            return Grouped().build(x_TD, index_TK, weight_TK, args)
        C = spec.capacity(args.capacity_factor, T, K, args.E)
        slot_R, kept_R = _slots(index_TK, weight_TK, C, args)
        row_S, filled_S = rows_of_slots(slot_R, kept_R, args.E * C)
        x_SD = gather(x_TD, row_S // K, slot_R.view(T, K), valid=filled_S, back_valid=kept_R.view(T, K))
        h_ECF = torch.einsum("ecd,end->ecn", x_SD.view(args.E, C, -1), args.w_in)
        h_ECF = activate(h_ECF if args.b_in is None else h_ECF + args.b_in.unsqueeze(1), args)
        y_ECD = torch.einsum("ecf,edf->ecd", h_ECF, args.w_out)
        y_ECD = y_ECD if args.b_out is None else y_ECD + args.b_out.unsqueeze(1)
        y_SD = y_ECD.reshape(args.E * C, args.w_out.shape[1])
        y_RD = gather(y_SD, slot_R, row_S, valid=kept_R, back_valid=filled_S)
        weight_TK = torch.where(kept_R.view(T, K), weight_TK, 0.0)
        return combine(y_RD.view(T, K, args.w_out.shape[1]), weight_TK, x_TD.dtype)


def _slots(index_TK: Tensor, weight_TK: Tensor, C: int, args: ExpertArgs) -> tuple[Tensor, Tensor]:
    """Each routed row's slot ``e*C + rank`` (0 where dropped) and whether it is kept."""
    expert_R = index_TK.reshape(-1).long()
    inside_R = expert_R.clamp(0, args.E - 1)
    priority_R = weight_TK.detach().reshape(-1) if args.drop_policy == "probability" else None
    rank_R = rank_in_group(expert_R, priority_R)
    kept_R = (rank_R < C) & (inside_R == expert_R)
    return torch.where(kept_R, expert_R * C + rank_R, 0), kept_R
