"""A dense FFN and an MoE side by side (OLMo-core's hybrid block)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Hybrid(nn.Module):
    """``dense(dense_norm(x)) + moe(moe_norm(x))``; a norm that is None is left out.

    ``dense`` and ``moe`` are any modules from ``[..., D]`` to ``[..., D]``.  What ``forward`` is given beside x (a
    mask, ``loss_div_factor``, ``return_losses``) goes to the MoE; where that returns ``(y, losses)``, so does this.
    Source: OLMo-core's ``MoEHybridTransformerBlock``, where each half has a norm of its own.
    """

    def __init__(
        self,
        dense: nn.Module,
        moe: nn.Module,
        *,
        dense_norm: nn.Module | None = None,
        moe_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.dense, self.moe = dense, moe
        self.dense_norm, self.moe_norm = dense_norm, moe_norm

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``[..., D] -> [..., D]``."""
        dense = self.dense(x if self.dense_norm is None else self.dense_norm(x))
        routed = self.moe(x if self.moe_norm is None else self.moe_norm(x), *args, **kwargs)
        if isinstance(routed, tuple):
            y, *rest = routed
            return (dense + y, *rest)
        return dense + routed
