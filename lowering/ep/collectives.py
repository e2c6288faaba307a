"""Collectives with written adjoints, each in two halves: one that begins it and one that waits.

Contract
    ``begin_all_to_all``      adjoint: all-to-all with the splits swapped
    ``begin_all_gather``      adjoint: reduce-scatter (sum), and the other way round
    ``begin_sum_of_parts``    all-reduce; adjoint: identity, for all ranks then hold the same loss of the same sum
    ``used_in_parts``         identity; adjoint: all-reduce, for each rank's gradient is that of what it computed
    ``on_first``              the first rank's copy of what is equal on all ranks, zeros elsewhere; adjoint: the first
                              rank's gradient for all
    ``mean_gradient``         identity; adjoint: division by the number of ranks
    What is computed between ``begin_*`` and ``Pending.wait`` runs while the rows travel.  Backwards, too: the adjoint
    begins where the forward waited and is waited for where the forward began; autograd does the work between in turn.
    The functional ops (``_c10d_functional``) stand in the graph, forwards and backwards, each with its ``wait_tensor``.
    Rows may be of any number, 0 included; every rank of the group must make the same calls in the same order.
Sums and parts: the f and g of Megatron-LM (Shoeybi et al. 2019); ``mean_gradient``: data parallelism's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


class _Ways(NamedTuple):
    """A collective and its adjoint, as functions that begin them; ``back=None``: the adjoint is the identity."""

    forth: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor] | None


class _Begun(torch.autograd.Function):
    """``(link, pending)``: the link has x's shape and carries its gradient, which is under way when it comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ways: _Ways) -> tuple[Tensor, Tensor]:
        ctx.waits = ways.back is not None
        pending = ways.forth(x)
        ctx.mark_non_differentiable(pending)
        return x.view_as(x), pending

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _compat.wait(grads[0]) if ctx.waits else grads[0], None


class _Waited(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, pending: Tensor, ways: _Ways) -> Tensor:
        ctx.ways = ways
        # Activation checkpointing's second forward ends with the last tensor that was saved: not before this wait.
        ctx.save_for_backward(link.new_empty(0))
        return _compat.wait(pending)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ways: _Ways = ctx.ways
        return grads[0] if ways.back is None else ways.back(grads[0]), None, None


class _UsedInParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _compat.all_reduce(grads[0], ctx.group.name), None


class _OnFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x) if group.rank == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0] if ctx.group.rank == 0 else torch.zeros_like(grads[0])
        return _compat.all_reduce(grad, ctx.group.name), None


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.ranks, None


@dataclass(frozen=True)
class Pending:
    """A collective under way."""

    result: Tensor
    link: Tensor | None
    ways: _Ways

    def wait(self) -> Tensor:
        """Its result; once."""
        if self.link is None:
            return _compat.wait(self.result)
        y: Tensor = _Waited.apply(self.link, self.result, self.ways)  # type: ignore[no-untyped-call]
        return y


def _begin(x: Tensor, forth: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor] | None) -> Pending:
    ways = _Ways(forth, back)
    if not x.is_floating_point():
        return Pending(forth(x), None, ways)
    link, pending = _Begun.apply(x, ways)  # type: ignore[no-untyped-call]
    return Pending(pending, link, ways)


def begin_all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: Group) -> Pending:
    """``send[j]`` rows in turn to rank j, ``receive[i]`` from rank i: ``[sum(send), ...] -> [sum(receive), ...]``."""
    return _begin(
        x,
        lambda t: _compat.begin_all_to_all(t, receive, send, group.name),
        lambda g: _compat.begin_all_to_all(g, send, receive, group.name),
    )


def begin_all_gather(x: Tensor, group: Group) -> Pending:
    """Every rank's x, of the same shape everywhere: ``[T, ...] -> [P*T, ...]``."""
    return _begin(
        x,
        lambda t: _compat.begin_all_gather(t, group.size, group.name),
        lambda g: _compat.begin_reduce_scatter(g, group.size, group.name),
    )


def begin_reduce_scatter(x: Tensor, group: Group) -> Pending:
    """This rank's rows of the sum over ranks: ``[P*T, ...] -> [T, ...]``."""
    return _begin(
        x,
        lambda t: _compat.begin_reduce_scatter(t, group.size, group.name),
        lambda g: _compat.begin_all_gather(g, group.size, group.name),
    )


def begin_sum_of_parts(x: Tensor, group: Group) -> Pending:
    """The sum over ranks, of which all ranks go on to compute the same."""
    return _begin(x, lambda t: _compat.begin_all_reduce(t, group.name), None)


def used_in_parts(x: Tensor, group: Group) -> Tensor:
    """``x``, the same on all ranks, each of which computes a part of the sum that becomes the result."""
    y: Tensor = _UsedInParts.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def on_first(x: Tensor, group: Group) -> Tensor:
    """``x``, the same on all ranks, where a sum over the ranks is to count it once."""
    y: Tensor = _OnFirst.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def mean_gradient(x: Tensor, ranks: int) -> Tensor:
    """``x`` with a gradient divided by the number of ranks."""
    y: Tensor = _MeanGradient.apply(x, ranks)  # type: ignore[no-untyped-call]
    return y
