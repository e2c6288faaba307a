"""Weights of sliced experts as every other layout of ranks stores them.

Contract
    ``canonical``  a state dict whose ``w_in [E, n, F, D]`` are ``[E, n*F, D]`` and whose ``b_in [E, n, F]`` are
                   ``[E, n*F]``, an optimizer's tensors of their shapes too: names, shapes and values of one rank
    ``restore``    what was read into such a state dict, back into the state dict that it was made of
    Both are collective over the ranks that slice the experts: each has parts of F that do not follow one another in the
    canonical layout, so that ``w_in`` is cut along D there, and ``b_in`` is whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from moepass.nn.sharded import F_DIM, STACKED
from moepass.parallel.checks import blocks_of


def canonical(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """``state`` (``{"model": ..., "optimizer": ...}``) with sliced weights in the layout of one rank."""
    names = _sliced(model)
    return _mapped(state, names, _stacked) if names else state


def restore(model: nn.Module, state: dict[str, Any], read: dict[str, Any]) -> None:
    """Copy sliced weights of ``read``, which ``canonical`` made of ``state``, into ``state``."""
    for name in _sliced(model):
        for own, found in _pairs(state, read, name):
            own.to_local().copy_(_apart(found, own).to_local())


def _sliced(model: nn.Module) -> set[str]:
    """Names of parameters that are kept as ``[E, n, F, ...]``."""
    blocks = {name: block for name, block in blocks_of(model).items() if block.parallel and block.parallel.tp}
    return {f"{name}.{weight}".lstrip(".") for name in blocks for weight in STACKED}


def _mapped(state: Any, names: set[str], change: Any, inside: bool = False) -> Any:
    """A copy of nested dicts with ``change`` applied to the tensors below a key of ``names``."""
    if isinstance(state, dict):
        return {key: _mapped(value, names, change, inside or key in names) for key, value in state.items()}
    return change(state) if inside and isinstance(state, DTensor) and state.dim() > F_DIM else state


def _pairs(state: Any, read: Any, name: str, inside: bool = False) -> list[tuple[DTensor, DTensor]]:
    """Tensors below ``name`` in both."""
    if isinstance(state, dict):
        found = []
        for key, value in state.items():
            found += _pairs(value, read[key], name, inside or key == name)
        return found
    return [(state, read)] if inside and isinstance(state, DTensor) and state.dim() > F_DIM else []


def _stacked(weight: DTensor) -> DTensor:
    """``[E, n, F, ...] -> [E, n*F, ...]``."""
    moved = weight.redistribute(placements=_placements(weight, 3))
    shape = (weight.shape[0], weight.shape[1] * weight.shape[2], *weight.shape[3:])
    local: Tensor = moved.to_local().flatten(1, 2)
    return DTensor.from_local(local, weight.device_mesh, _placements(weight, 2), run_check=False,
                              shape=torch.Size(shape), stride=_strides(shape))  # fmt: skip


def _apart(found: DTensor, like: DTensor) -> DTensor:
    """The way back."""
    local = found.to_local().unflatten(1, tuple(like.shape[1:3]))
    moved = DTensor.from_local(local, like.device_mesh, _placements(like, 3), run_check=False,
                               shape=like.shape, stride=_strides(tuple(like.shape)))  # fmt: skip
    return moved.redistribute(placements=like.placements)


def _placements(weight: DTensor, d: int) -> list[Placement]:
    """F whole, and dimension ``d`` cut in its place where a matrix has so many columns for every rank."""
    mesh, columns = weight.device_mesh, weight.shape[3] if weight.dim() > 3 else 0
    found: list[Placement] = []
    for i, placement in enumerate(weight.placements):
        if not placement.is_shard(F_DIM):
            found.append(placement)
        else:
            found.append(Shard(d) if columns and columns % mesh.size(i) == 0 else Replicate())
    return found


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
