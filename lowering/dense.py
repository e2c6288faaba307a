"""All-experts einsum: every expert computes every token, the routing weights mask the sum.

Contract
    in    x_TD, index_TK, weight_TK and the expert weights; any device, any floating dtype
    out   y_TD in x's dtype; the sum over experts in float32
    cost  2(n+1)*T*E*D*F FLOPs whatever the routing: wins when all experts are active and T is small, or E/K is small
    never synchronises with the host; static shapes; safe under CUDA graphs
Source: MaxText ``dense_matmul`` without capacity; GShard (Lepikhin et al. 2020) for the notation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moepass.lowering.base import ExpertArgs, Lowering, activate, keeps_all_tokens
from moepass.lowering.cost import price_dense
from moepass.lowering.plan import Price, Verdict, Workload

if TYPE_CHECKING:
    from moepass.lowering.hardware import Hardware


@dataclass(frozen=True)
class DenseEinsum(Lowering):
    """See the module docstring."""

    name = "dense"

    def legal(self, work: Workload) -> Verdict:
        """Only where nothing is dropped."""
        return keeps_all_tokens(work)

    def price(self, work: Workload, hw: Hardware) -> Price:
        """``cost.price_dense``."""
        return price_dense(work, hw)

    def computed_rows(self, load_E: Sequence[int], work: Workload) -> int:
        """Every token for every expert."""
        return work.tokens * len(load_E)

    def build(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
        """Two batched GEMMs over all experts."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        # Comparison, not scatter: an index behind the last expert is no column, and a repeated expert adds up.
        hit_TKE = index_TK.unsqueeze(-1) == torch.arange(args.E, device=index_TK.device)
        gate_TE = torch.where(hit_TKE, weight_TK.unsqueeze(-1), 0.0).sum(1)
        chosen_TE = hit_TKE.any(1)
        x_TD = torch.where(chosen_TE.any(1, keepdim=True), x_TD, 0.0)  # a token without experts may hold anything
        h_TEF = torch.einsum("td,end->ten", x_TD, args.w_in)
        h_TEF = h_TEF if args.b_in is None else h_TEF + args.b_in
        # where, not a product with zero: an expert that nobody chose may overflow.  Before the activation, for its
        # hidden values are factors of the gradient of w_out too.
        h_TEF = activate(torch.where(chosen_TE.unsqueeze(-1), h_TEF, 0.0), args)
        y_TED = torch.einsum("tef,edf->ted", h_TEF, args.w_out)
        y_TED = y_TED if args.b_out is None else y_TED + args.b_out
        y_TED = torch.where(chosen_TE.unsqueeze(-1), y_TED.to(wide) * gate_TE.to(wide).unsqueeze(-1), 0.0)
        return y_TED.sum(1).to(x_TD.dtype)
