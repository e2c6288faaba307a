"""One op per lowering, with the schema of ``moepass::experts``: what the backend puts in the semantic op's place.

``moepass::experts_NAME``, for every name of ``registry.lowerings``, is CompositeImplicitAutograd: AOTAutograd runs its
Python body while tracing, so that Inductor sees aten ops and our kernels' ops, with gradients, dynamic shapes and
autocast as in eager mode, and no Python callable stays in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepass._compat import OpOverload
from moepass.lowering.base import ExpertArgs
from moepass.lowering.eager import run_lowering
from moepass.lowering.registry import lowerings
from moepass.ops import SCHEMA

library = torch.library.Library("moepass", "FRAGMENT")


def _define(name: str) -> None:
    def body(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *rest: Any) -> Tensor:
        return run_lowering(name, x_TD, index_TK, weight_TK, ExpertArgs(*rest))

    library.define(f"experts_{name}{SCHEMA}")
    library.impl(f"experts_{name}", body, "CompositeImplicitAutograd")


for _name in lowerings():
    _define(_name)


def lowered_op(name: str) -> OpOverload:
    """The op of a lowering, to be put in the place of ``moepass::experts``."""
    op: OpOverload = getattr(torch.ops.moepass, f"experts_{name}").default
    return op
