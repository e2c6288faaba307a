"""The lowerings that exist, in the order in which ties are decided.  A function, not a mutable registry."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moepass.lowering.base import Lowering


@functools.cache
def lowerings() -> Mapping[str, Lowering]:
    """Every lowering by name; read-only."""
    # Imported here: the lowerings register torch.library ops, which planning alone does not need.
    from moepass.lowering.capacity import FixedCapacity
    from moepass.lowering.dense import DenseEinsum
    from moepass.lowering.fused import Fused, FusedRecompute
    from moepass.lowering.gathered import Gathered
    from moepass.lowering.grouped import Grouped

    members = (Grouped(), DenseEinsum(), Gathered(), FixedCapacity(), Fused(), FusedRecompute())
    return MappingProxyType({lowering.name: lowering for lowering in members})
