"""Ranks that disagree are named before they hang: one exchange of facts.

Contract
    Collective over all dimensions of a mesh, and never half-way: every rank learns the facts of all before any raises,
    so that all of them do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import moepass
from moepass import _compat, errors
from moepass.nn.sharded import ExpertParallel
from moepass.parallel.checks import blocks_of

Facts = Mapping[str, str]


def agree(model: nn.Module, mesh: DeviceMesh, settings: Mapping[str, ExpertParallel]) -> None:
    """Raise ``RanksDiffer`` unless all ranks of the mesh hold the same blocks with the same settings."""
    everyone = _compat.everyones(facts(model, settings), [group.group_name for group in mesh.get_all_groups()])
    if differences := compare(everyone):
        raise errors.RanksDiffer(differences="; ".join(differences[:8]))


def facts(model: nn.Module, settings: Mapping[str, ExpertParallel]) -> dict[str, str]:
    """What must be equal on all ranks, by name."""
    said = {"moepass": moepass.__version__, "torch": torch.__version__, "blocks": ", ".join(settings)}
    for name, block in blocks_of(model).items():
        at = settings[name]
        said |= {f"{name}.{field}": text for field, text in _spec(block.spec.model_dump()).items()}
        said[f"{name}.dtype"] = str(block.w_in.dtype)
        said[f"{name}.shape"] = str(tuple(block.w_in.shape))
        said[f"{name}.trained"] = str(block.w_in.requires_grad)
        said |= {f"{name}.{k}": str(v) for k, v in at.arguments().items() if k not in ("groups", "tp", "places")}
        said[f"{name}.tp"] = str(bool(at.tp))
    return said


def _spec(values: Mapping[str, Any], path: str = "spec") -> dict[str, str]:
    """The fields of a spec by their paths."""
    found: dict[str, str] = {}
    for key, value in values.items():
        inner = f"{path}.{key}"
        found |= _spec(value, inner) if isinstance(value, Mapping) else {inner: repr(value)}
    return found


def compare(everyone: Mapping[int, Facts]) -> list[str]:
    """One sentence for each fact that differs: its values, and the ranks that hold each."""
    found = []
    for fact in sorted({fact for said in everyone.values() for fact in said}):
        holders: dict[str, list[int]] = {}
        for rank, said in sorted(everyone.items()):
            holders.setdefault(said.get(fact, "missing"), []).append(rank)
        if len(holders) > 1:
            parts = (f"{value} on rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}" for value, r in holders.items())
            found.append(f"{fact} is {' and '.join(parts)}")
    return found
