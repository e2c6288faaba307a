"""Collectives with written adjoints.

Contract
    ``all_to_all``      adjoint: all-to-all with the splits swapped
    ``all_gather``      adjoint: reduce-scatter (sum), and the other way round
    ``sum_of_parts``    all-reduce; adjoint: identity, for all ranks then hold the same loss of the same sum
    ``used_in_parts``   identity; adjoint: all-reduce, for each rank's gradient is that of the part which it computed
    ``mean_gradient``   identity; adjoint: division by the number of ranks
    The functional ops (``_c10d_functional``) stand in the graph, forwards and backwards, each with its ``wait_tensor``.
    Rows may be of any number, 0 included; every rank of the group must make the same calls in the same order.
The last three are the f and g of Megatron-LM (Shoeybi et al. 2019) and the mean over data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moepass import _compat


class Group(NamedTuple):
    """A process group by the name that functional collectives use."""

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, name: str) -> Group:
        """Look it up."""
        return cls(name, *_compat.group_size_and_rank(name))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, receive: Sequence[int], send: Sequence[int], group: str) -> Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, group
        return _compat.all_to_all(x, receive, send, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _compat.all_to_all(grads[0], ctx.send, ctx.receive, ctx.group), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _compat.all_gather(x, group.size, group.name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _compat.reduce_scatter(grads[0], ctx.group.size, ctx.group.name), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _compat.reduce_scatter(x, group.size, group.name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _compat.all_gather(grads[0], ctx.group.size, ctx.group.name), None


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:  # noqa: ARG004 -- the signature of a Function
        return _compat.all_reduce(x, group.name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class _UsedInParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _compat.all_reduce(grads[0], ctx.group.name), None


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.ranks, None


def all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: Group) -> Tensor:
    """``send[j]`` rows in turn to rank j, ``receive[i]`` from rank i: ``[sum(send), ...] -> [sum(receive), ...]``."""
    if not x.is_floating_point():
        return _compat.all_to_all(x, receive, send, group.name)
    y: Tensor = _AllToAll.apply(x, receive, send, group.name)  # type: ignore[no-untyped-call]
    return y


def all_gather(x: Tensor, group: Group) -> Tensor:
    """Every rank's x, of the same shape everywhere: ``[T, ...] -> [P*T, ...]``."""
    if not x.is_floating_point():
        return _compat.all_gather(x, group.size, group.name)
    y: Tensor = _AllGather.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """This rank's rows of the sum over ranks: ``[P*T, ...] -> [T, ...]``."""
    y: Tensor = _ReduceScatter.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def sum_of_parts(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks, of which all ranks go on to compute the same."""
    y: Tensor = _SumOfParts.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def used_in_parts(x: Tensor, group: Group) -> Tensor:
    """``x``, the same on all ranks, each of which computes a part of the sum that becomes the result."""
    y: Tensor = _UsedInParts.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def mean_gradient(x: Tensor, ranks: int) -> Tensor:
    """``x`` with a gradient divided by the number of ranks."""
    y: Tensor = _MeanGradient.apply(x, ranks)  # type: ignore[no-untyped-call]
    return y
