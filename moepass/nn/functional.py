"""Routing as the modules call it.

``route`` is ``moepass.reference.route``: plain PyTorch with static control flow, safe under Dynamo, fx and export.  It
stays outside the opaque ops so that compilers see and fuse it.
"""

from __future__ import annotations

from torch import Tensor

from moepass import reference
from moepass.spec import RouterSpec


def route(logits_TE: Tensor, spec: RouterSpec, *, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose K experts a token: ``(index_TK int64, weight_TK float32)``, best first, ties to the lower index.

    ``bias [E]`` is added where experts are chosen and not to their weights.  float64 logits give float64 weights.
    """
    index_TK, weight_TK = reference.route(logits_TE, spec, bias=bias)
    return index_TK, weight_TK
