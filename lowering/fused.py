"""Our Triton kernels: gather in the A-load, activation in the epilogue, gather-sum combine; backward without atomics.

Contract
    in    x_TD, index_TK, weight_TK and the expert weights in one dtype: float32, bfloat16 or float16; any layout
    out   y_TD in x's dtype; the sum over K in float32, in a fixed order
    cost  2(n+1)*D*F FLOPs for each row padded to BLOCK_M; the weights of the active experts; 4 or 6 launches forward,
          3 for T <= 4 without gradients, where weights are streamed and nothing is padded
    saves x and the pre-activations, or x only (``fused_recompute``), which runs the up projection twice
          no host synchronisation, buffer sizes follow T alone
    runs  on accelerators that passed ``lowering.self_check``; on a CPU only in Triton's interpreter, for tests
Source: ScatterMoE (Tan et al. 2024), SonicMoE (2512.14080), vLLM's fused_moe; reference/kernels.md 1.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from moepass import errors
from moepass.kernels.fused import runner
from moepass.kernels.fused.launch import cdiv, power_of_two
from moepass.kernels.fused.ops import fused_experts
from moepass.kernels.fused.problem import ITEMSIZE
from moepass.kernels.fused.schedule import row_tile
from moepass.kernels.fused.schedule_decode import MOST_TOKENS
from moepass.lowering import self_check
from moepass.lowering.base import ExpertArgs, Lowering, keeps_all_tokens
from moepass.lowering.cost import price_fused
from moepass.lowering.plan import Price, Verdict, Workload

if TYPE_CHECKING:
    from moepass.lowering.hardware import Hardware

#: Experts that the routing kernels have bins for.
MAX_EXPERTS = 512


@dataclass(frozen=True)
class Fused(Lowering):
    """See the module docstring.  In training it keeps the pre-activations."""

    name = "fused"
    keeps: ClassVar[bool] = True

    def legal(self, work: Workload) -> Verdict:
        """Where Triton runs, nothing is dropped, and the kernels have the dtype."""
        if work.capacity_factor is not None:
            return keeps_all_tokens(work)
        if work.device not in ("cuda", "cpu") or not runner.available(work.device):
            return Verdict.no("no_triton", f"no Triton kernel runs on {work.device} here; they need an accelerator")
        if work.dtype not in ITEMSIZE:
            return Verdict.no("dtype", f"the kernels compute in {', '.join(ITEMSIZE)}, not in {work.dtype}")
        if work.dropout:
            return Verdict.no("dropout", "the kernels keep no hidden activations, and have no dropout on them")
        if work.E > MAX_EXPERTS:
            return Verdict.no("experts", f"the routing kernels take {MAX_EXPERTS} experts at most, not {work.E}")
        here = work.device == "cuda" and torch.cuda.is_available()
        if here and (wrong := self_check.failure(work.device)) is not None:
            return Verdict.no("self_check", f"the kernels failed their check on this machine: {wrong}")
        return Verdict.yes()

    def price(self, work: Workload, hw: Hardware) -> Price:
        """``cost.price_fused``."""
        return price_fused(work, hw, recompute=not self.keeps)

    def computed_rows(self, load_E: Sequence[int], work: Workload) -> int:
        """Each expert's rows up to whole tiles; a few tokens have none."""
        if not work.train and work.tokens <= MOST_TOKENS:
            return sum(load_E)
        R = power_of_two(work.tokens) * work.K  # the tiles are chosen for T rounded up (``kernels.fused.ops``)
        m = row_tile(R / max(1, min(work.E, R)), work.dtype)
        return sum(cdiv(rows, m) * m for rows in load_E)

    def build(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
        """One op, whose backward pass is another.  Raises ``FusedOperands`` for dropout."""
        if args.dropout > 0.0:
            remedy = "pin another lowering, or set dropout to 0"
            raise errors.FusedOperands(detail=f"dropout={args.dropout}", remedy=remedy)
        differentiated = (x_TD, weight_TK, args.w_in, args.w_out, args.b_in, args.b_out)
        save = self.keeps and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiated)
        return fused_experts(
            x_TD, index_TK, weight_TK.float(), args.w_in, args.w_out, args.b_in, args.b_out,
            activation=args.activation, interleaved=args.interleaved, save=save,
        )  # fmt: skip


@dataclass(frozen=True)
class FusedRecompute(Fused):
    """The same kernels, keeping x only: the backward pass computes the pre-activations again.

    Dearer in time than ``fused`` by one up projection: the choice where ``Workload.save_limit`` rules that out.
    """

    name = "fused_recompute"
    keeps = False
    inference = "fused"

    def legal(self, work: Workload) -> Verdict:
        """As ``fused``, where there is a backward pass."""
        verdict = super().legal(work)
        if verdict.legal and not work.train:
            return Verdict.no("inference", "nothing is kept for a backward pass where there is none: as fused")
        return verdict
