"""Expert-parallel meshes, DTensor placement and distributed checkpoints (DESIGN section 7)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moepass.parallel.checkpoint import load_checkpoint, save_checkpoint
    from moepass.parallel.gathering import gather
    from moepass.parallel.gradients import average_gradients, clip_grad_norm_
    from moepass.parallel.loading import load
    from moepass.parallel.placement import parallelize
    from moepass.parallel.upcycling import convert

#: Public name -> module; loaded when first used, as in ``moepass`` itself.
_PUBLIC = {
    "average_gradients": "gradients",
    "clip_grad_norm_": "gradients",
    "convert": "upcycling",
    "gather": "gathering",
    "load": "loading",
    "load_checkpoint": "checkpoint",
    "parallelize": "placement",
    "save_checkpoint": "checkpoint",
}

__all__ = [
    "average_gradients",
    "clip_grad_norm_",
    "convert",
    "gather",
    "load",
    "load_checkpoint",
    "parallelize",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moepass.parallel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moepass.parallel.{_PUBLIC[name]}"), name)
