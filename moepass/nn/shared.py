"""What stands beside and around the routed experts: shared experts, and rows made of weighted tokens.

Contract
    Plain functions of tensors; ``moepass.nn.MoE`` owns the parameters.
    ``moepass::feed_forward`` is CompositeImplicitAutograd: one node in the graphs of Dynamo and torch.export, and
    decomposed by AOTAutograd.  It is an op because Dynamo cannot read activation expressions, and so that the backend,
    which turns dense feed-forward blocks into experts, leaves the dense part of an MoE block as it is.

Shapes: T tokens, D model width, F expert width, E experts, K top-k, R = T*K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moepass import pointwise, reference

#: ``(x_RD, index_RK, weight_RK) -> y_RD``: the expert op with the expert weights filled in.
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]

library = torch.library.Library("moepass", "FRAGMENT")
library.define("feed_forward(Tensor x, Tensor w_in, Tensor w_out, str activation, float dropout) -> Tensor")


def _feed_forward(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str, dropout: float) -> Tensor:
    h = pointwise.apply(activation, F.linear(x, w_in))
    return F.linear(F.dropout(h, dropout) if dropout > 0.0 else h, w_out)


library.impl("feed_forward", _feed_forward, "CompositeImplicitAutograd")


def feed_forward(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str, dropout: float = 0) -> Tensor:
    """A dense FFN ``[..., D] -> [..., D]``: ``w_in [n*F, D]`` gate rows first, ``w_out [D, F]``.

    ``dropout`` is the probability on the hidden activations: pass 0 in evaluation.
    """
    y: Tensor = torch.ops.moepass.feed_forward(x, w_in, w_out, activation, dropout)
    return y


def combine_shared(y: Tensor, s: Tensor, how: str, *, top_k: int, gate: Tensor | None = None) -> Tensor:
    """Routed output y and shared output s as one.

    ``sum``: y + s (DeepSeek).  ``gated``: ``y + sigmoid(gate) * s`` with ``gate [..., 1]`` (Qwen2-MoE).  ``mixed``:
    ``(s + K*y)/(K+1)``, the mean over K+1 experts (OLMo-core).
    """
    if how == "mixed":
        return s / (top_k + 1) + y * (top_k / (top_k + 1))
    if how == "gated" and gate is not None:
        s = torch.sigmoid(gate) * s
    return y + s


def weigh_inputs(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, out_weight_TK: Tensor, experts: Experts) -> Tensor:
    """``y_t = sum_k out_weight[t,k] * expert_{index[t,k]}(weight[t,k] * x_t)`` (Llama 4): one row for every pair.

    Products are rounded once, to x's dtype; the sum over K runs in float32 (float64 for float64).
    """
    (T, D), K = x_TD.shape, index_TK.shape[1]
    x_RD = (x_TD.unsqueeze(1) * weight_TK.unsqueeze(-1)).to(x_TD.dtype).reshape(T * K, D)
    y_RD = experts(x_RD, index_TK.reshape(-1, 1), out_weight_TK.reshape(-1, 1))
    if K == 1:
        return y_RD
    wide = reference.wide(y_RD.dtype)
    return y_RD.reshape(T, K, D).sum(1, dtype=wide).to(y_RD.dtype)
