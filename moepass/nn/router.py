"""The router: one matrix from tokens to expert logits.

Contract
    in    x_TD, any floating dtype
    out   index_TK int64, weight_TK float32, best expert first
    Logits are computed in float32 (float64 for float64 inputs) whatever the parameter's dtype or autocast say: bfloat16
    logits tie, and ties route tokens by accident (``reference/upcycling.md``, section 1.0).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import moepass.ops
from moepass.nn import functional
from moepass.spec import RouterSpec

#: Standard deviation of the logits of a fresh router on an input of root mean square 1: nearly uniform at every width.
LOGIT_STD = 0.1


class Router(nn.Module):
    """``weight [E, D]``; ``forward(x_TD) -> (index_TK, weight_TK)`` by a ``RouterSpec``."""

    def __init__(
        self,
        D: int,
        E: int,
        spec: RouterSpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(E, D, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw N(0, 0.1/sqrt(D)): logits of standard deviation 0.1 on normalised inputs.  No-op on the meta device."""
        if not self.weight.is_meta:
            self.weight.normal_(0.0, LOGIT_STD / math.sqrt(self.weight.shape[1]), generator=generator)

    def logits(self, x_TD: Tensor) -> Tensor:
        """``x @ weight.T`` in float32: ``[T, D] -> [T, E]``."""
        return moepass.ops.router_logits(x_TD, self.weight)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights of every token: ``index_TK`` int64, ``weight_TK`` float32."""
        return functional.route(self.logits(x_TD), self.spec)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        E, D = self.weight.shape
        rule = self.spec.score if self.spec.normalize is None else f"{self.spec.score}/L{self.spec.normalize:g}"
        return f"{D} -> {E}, top_k={self.spec.top_k}, {rule}, scale={self.spec.scale:g}"
