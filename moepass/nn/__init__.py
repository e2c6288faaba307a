"""Mixture-of-experts modules that run eagerly, under ``torch.compile`` and under ``torch.export``."""

from __future__ import annotations

from moepass.nn.moe import MoE
from moepass.nn.router import Router

__all__ = ["MoE", "Router"]
