"""Each routed row reads its own expert's weights: decoding, where few rows share an expert.

Contract
    in    x_TD, index_TK, weight_TK and the expert weights
    out   y_TD in x's dtype; the sum over K in float32
    cost  weight bytes of R = T*K experts, no sort: wins at one or two tokens
Source: HF transformers' ``batched_mm`` without its copy of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from moepass.kernels.rows import combine
from moepass.kernels.rows_linear import rows_linear
from moepass.lowering.base import ExpertArgs, Lowering, activate, computed_weights, keeps_all_tokens
from moepass.lowering.cost import price_gathered
from moepass.lowering.plan import Price, Verdict, Workload

if TYPE_CHECKING:
    from moepass.lowering.hardware import Hardware


@dataclass(frozen=True)
class Gathered(Lowering):
    """See the module docstring."""

    name = "gathered"

    def legal(self, work: Workload) -> Verdict:
        """Only where nothing is dropped."""
        return keeps_all_tokens(work)

    def price(self, work: Workload, hw: Hardware) -> Price:
        """``cost.price_gathered``."""
        return price_gathered(work, hw)

    def build(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
        """Two mat-vecs per routed row."""
        T, K = index_TK.shape
        D = x_TD.shape[1]
        expert_R = index_TK.reshape(-1)
        x_RD = x_TD.unsqueeze(1).expand(T, K, D).reshape(-1, D)
        h_RF = activate(rows_linear(x_RD, args.w_in, args.b_in, expert_R), args)
        y_RD = rows_linear(h_RF, args.w_out, args.b_out, expert_R)
        weight_TK = computed_weights(index_TK, weight_TK, args.E)
        return combine(y_RD.view(T, K, args.w_out.shape[1]), weight_TK, x_TD.dtype)
