"""Collectives over the groups and meshes of torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor


def group_size_and_rank(name: str) -> tuple[int, int]:
    """``(ranks, own rank)`` of the process group that functional collectives know by ``name``."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    group = _resolve_process_group(name)  # type: ignore[arg-type]  # not a plain str since torch 2.12
    return group.size(), group.rank()


def places(groups: Sequence[str]) -> tuple[int, ...]:
    """Number of ranks and own rank of each group, one behind the other."""
    return tuple(number for name in groups for number in group_size_and_rank(name))


def everyones(value: Any, groups: Sequence[str]) -> dict[int, Any]:
    """What every rank of a product of groups says, by global rank: an exchange of Python objects.

    Over the groups in turn, so that all ranks hear of all before any can act.  Ranks of a fake group are not there.
    """
    from torch.distributed import all_gather_object, get_backend, get_rank
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    everyone = {get_rank(): value}
    for name in groups:
        group = _resolve_process_group(name)  # type: ignore[arg-type]
        if get_backend(group) == "fake":
            continue
        gathered: list[Any] = [None] * group.size()
        all_gather_object(gathered, everyone, group=group)
        everyone = {rank: said for part in gathered for rank, said in part.items()}
    return everyone


def begin_all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over a group's ranks, by the functional op, under way (``wait``); nothing here is differentiable."""
    return cast(Tensor, torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group))


def begin_all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """The ranks' tensors (of one shape) one behind the other, under way."""
    return cast(Tensor, torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group))


def begin_reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """This rank's part of the sum over the ranks, under way."""
    return cast(Tensor, torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", size, group))


def begin_all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: str) -> Tensor:
    """Rows to and from every rank of a group, under way."""
    op = torch.ops._c10d_functional.all_to_all_single
    return cast(Tensor, op(x.contiguous(), list(receive), list(send), group))


def wait(pending: Tensor) -> Tensor:
    """The result of a collective that was begun; until then nobody may read it."""
    return cast(Tensor, torch.ops._c10d_functional.wait_tensor(pending))


def all_reduce(x: Tensor, group: str) -> Tensor:
    """``begin_all_reduce``, waited for."""
    return wait(begin_all_reduce(x, group))


def all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """``begin_all_gather``, waited for."""
    return wait(begin_all_gather(x, size, group))


def all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: str) -> Tensor:
    """``begin_all_to_all``, waited for."""
    return wait(begin_all_to_all(x, receive, send, group))


def flattened(mesh: Any, dims: Sequence[str]) -> Any:
    """The one-dimensional mesh over several dimensions of a DeviceMesh."""
    return mesh[tuple(d for d in mesh.mesh_dim_names if d in dims)]._flatten()
