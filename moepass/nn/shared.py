"""What stands beside and around the routed experts: shared experts, and rows made of weighted tokens.

Contract
    Plain functions of tensors; ``moepass.nn.MoE`` owns the parameters.
    ``moepass::feed_forward`` is CompositeImplicitAutograd: one node in the graphs of Dynamo and torch.export, and
    decomposed by AOTAutograd.  It is an op because Dynamo cannot read activation expressions, and so that the backend,
    which turns dense feed-forward blocks into experts, leaves the dense part of an MoE block as it is.

Shapes: T tokens, D model width, F expert width, E experts, K top-k, R = T*K.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moepass import pointwise, reference

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


def weighed_rows(x_TD: Tensor, weight_TK: Tensor) -> Tensor:
    """``weight[t,k] * x_t`` for every pair (Llama 4), ``[T*K, D]``: rounded once, to x's dtype."""
    (T, D), K = x_TD.shape, weight_TK.shape[1]
    return (x_TD.unsqueeze(1) * weight_TK.unsqueeze(-1)).to(x_TD.dtype).reshape(T * K, D)


def summed_rows(y_RD: Tensor, K: int) -> Tensor:
    """The sum of each token's K rows in float32 (float64 for float64): ``[T*K, D] -> [T, D]``."""
    if K == 1:
        return y_RD
    wide = reference.wide(y_RD.dtype)
    return y_RD.reshape(y_RD.shape[0] // K, K, y_RD.shape[1]).sum(1, dtype=wide).to(y_RD.dtype)
