"""The MoE block as a module: a router and E feed-forward experts.

Contract
    in    x [..., D]
    out   [..., D] in x's dtype (the autocast dtype under autocast); ``moepass.reference.moe`` defines the value
    state ``router.weight [E, D]``, ``w_in [E, n*F, D]`` (gate rows first), ``w_out [E, D, F]``, and where the spec asks
          ``b_in [E, n*F]``, ``b_out [E, D]``
    Parameters may be exchanged for DTensors or FSDP shards: nothing is cached.  Dropout acts on the hidden activations
    and only in training mode.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import moepass.ops
from moepass import errors, pointwise
from moepass.nn.router import Router
from moepass.spec import MoESpec


class MoE(nn.Module):
    """A mixture-of-experts feed-forward block of model width D.  ``spec`` must name F and the activation."""

    def __init__(
        self,
        D: int,
        spec: MoESpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        F = spec.experts.intermediate_size
        if F is None or spec.experts.activation is None:
            raise errors.IncompleteSpec(missing="intermediate_size" if F is None else "activation", where="nn.MoE")
        E, rows = spec.experts.num_experts, spec.experts.n_projections * F

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.spec = spec
        # Zero as an int: under dynamic=True Dynamo makes floats symbolic, and would trace twice to find them constant.
        self.dropout, self.capacity_factor = spec.experts.dropout or 0, spec.dispatch.capacity_factor
        self.router = Router(D, E, spec.router, device=device, dtype=dtype)
        self.w_in = empty(E, rows, D)
        self.w_out = empty(E, D, F)
        self.b_in = empty(E, rows) if spec.experts.bias_in else None
        self.b_out = empty(E, D) if spec.experts.bias_out else None
        self._reset_experts(None)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every expert as ``nn.Linear`` would, and a nearly uniform router.  No-op on the meta device."""
        self.router.reset_parameters(generator)
        self._reset_experts(generator)

    @torch.no_grad()
    def _reset_experts(self, generator: torch.Generator | None) -> None:
        for weight, bias in ((self.w_in, self.b_in), (self.w_out, self.b_out)):
            bound = 1.0 / math.sqrt(weight.shape[-1])
            for parameter in (weight, bias):
                if parameter is not None and not parameter.is_meta:
                    parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``: each token goes to its top K experts, whose outputs are summed with its weights."""
        x_TD = x.reshape(-1, x.shape[-1])
        index_TK, weight_TK = self.router(x_TD)
        y_TD = moepass.ops.experts(
            x_TD,
            index_TK,
            weight_TK,
            self.w_in,
            self.w_out,
            self.b_in,
            self.b_out,
            activation=str(self.spec.experts.activation),
            dropout=self.dropout if self.training else 0,
            capacity_factor=self.capacity_factor,
            drop_policy=self.spec.dispatch.drop_policy,
        )
        return y_TD.reshape(x.shape)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        E, D, F = self.w_out.shape
        name = pointwise.display_name(str(self.spec.experts.activation))
        parts = [f"D={D}, F={F}, E={E}, {name}"]
        if self.spec.dispatch.capacity_factor is not None:
            parts.append(f"capacity_factor={self.spec.dispatch.capacity_factor:g} ({self.spec.dispatch.drop_policy})")
        if self.spec.experts.dropout:
            parts.append(f"dropout={self.spec.experts.dropout:g}")
        return ", ".join(parts)
