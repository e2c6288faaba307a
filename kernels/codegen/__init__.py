"""Pointwise programs as Triton functions: value and gradient of any activation of ``moepass.pointwise``.

``pointwise_functions("silu(g)*u")`` gives two JIT functions that the kernels take as constexpr arguments::

    value(g, u) -> h            grad(g, u, dh) -> (dg, du)          float32 blocks

A new operation is one row in ``rules.ROWS`` beside its row in ``moepass.pointwise.OPS``.
"""

from __future__ import annotations

from moepass.kernels.codegen.derive import source
from moepass.kernels.codegen.materialise import PointwiseFunctions, pointwise_functions

__all__ = ["PointwiseFunctions", "pointwise_functions", "source"]
