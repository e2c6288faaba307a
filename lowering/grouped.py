"""Dropless grouped GEMM: rows sorted by expert, one GEMM per expert, gathered back and summed.

Contract
    in    x_TD, index_TK, weight_TK and the expert weights
    out   y_TD in x's dtype; the sum over K in float32, in a fixed order (gather and sum, no atomics)
    cost  2(n+1)*R*D*F FLOPs, weight bytes of the active experts, permute traffic 2*R*D; pairs without an expert are
          moved but not computed
    no host synchronisation on accelerators; R is static, so buffers are
Source: MegaBlocks (Gale et al. 2022), torchtitan GroupedExperts, ScatterMoE (Tan et al. 2024) for the gather-sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from moepass.kernels.cpu.grouped import takes
from moepass.kernels.grouped_linear import grouped_linear
from moepass.kernels.rows import combine, gather
from moepass.kernels.sorting import sort_by_expert
from moepass.kernels.taken_linear import taken_linear
from moepass.lowering.base import ExpertArgs, Lowering, activate, computed_weights, keeps_all_tokens
from moepass.lowering.cost import price_grouped
from moepass.lowering.plan import Price, Verdict, Workload

if TYPE_CHECKING:
    from moepass.lowering.hardware import Hardware


@dataclass(frozen=True)
class Grouped(Lowering):
    """See the module docstring."""

    name = "grouped"

    def legal(self, work: Workload) -> Verdict:
        """Only where nothing is dropped."""
        return keeps_all_tokens(work)

    def price(self, work: Workload, hw: Hardware) -> Price:
        """``cost.price_grouped``."""
        return price_grouped(work, hw)

    def build(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
        """Sort, gather, GEMM, activation, GEMM, gather back, weighted sum."""
        T, K = index_TK.shape
        y_RD = _expert_rows(x_TD, index_TK, args)
        y_TKD = y_RD.view(T, K, args.w_out.shape[1])
        return combine(y_TKD, computed_weights(index_TK, weight_TK, args.E), x_TD.dtype)


def rows(x_RD: Tensor, expert_R: Tensor, args: ExpertArgs) -> Tensor:
    """``y_r = expert_{expert[r]}(x_r)``, zero for rows of nobody: ``[R, D] -> [R, D]``, in x's dtype."""
    return _expert_rows(x_RD, expert_R.unsqueeze(1), args)


def _expert_rows(x_TD: Tensor, index_TK: Tensor, args: ExpertArgs) -> Tensor:
    """What each pair's expert says of its token, ``[T*K, D]``; zero for pairs of nobody."""
    T, K = index_TK.shape
    order_R, inverse_R, offsets_E = sort_by_expert(index_TK, args.E)
    hidden = _hidden_pays(x_TD, args)
    if x_TD.device.type == "cpu" and takes(x_TD.dtype):
        h = taken_linear(x_TD, order_R, inverse_R, K, args.w_in, args.b_in, offsets_E)
    else:
        x_RD = gather(x_TD, order_R // K, inverse_R.view(T, K))
        h = grouped_linear(x_RD, args.w_in, args.b_in, offsets_E, to_hidden=hidden)
    h = activate(h, args, dim=0 if hidden else 1)
    y_RD = grouped_linear(h, args.w_out, args.b_out, offsets_E, from_hidden=hidden)
    return gather(y_RD, inverse_R, order_R)


def _hidden_pays(x_TD: Tensor, args: ExpertArgs) -> bool:
    """The hidden layout is for PyTorch's products on the CPU, and faster only for weights whose rows are contiguous.

    With transposed ones (GPT-OSS) it makes products of two transposed operands.
    """
    return x_TD.device.type == "cpu" and args.w_in.stride(-1) == 1 and not takes(x_TD.dtype)
