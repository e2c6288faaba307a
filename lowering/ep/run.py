"""The body of ``moepass::experts_ep``: from the op's arguments to a form.

Contract
    in    operands of ``moepass::experts`` with this rank's experts (E/P of them), indices of all E; names of the groups
    out   ``(y_TD, dropped, shared_TD)``: dropped, int64 ``[]``, counts pairs that found no room in a buffer;
          shared_TD is what a shared expert says of the tokens, empty where there is none
    The shared expert needs nothing of the other ranks: it runs between the start of the dispatch and the wait for it.
    Tensor parallelism is around a form, whatever it is: the parts that tp ranks compute of a token are summed once,
    after its rows are.  Under autocast the experts run, and rows travel, in the autocast dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moepass import _compat, errors, pointwise
from moepass.lowering import eager
from moepass.lowering.base import ExpertArgs
from moepass.lowering.eager import in_compute_dtype
from moepass.lowering.ep import all_gather, all_to_all, replicated
from moepass.lowering.ep.collectives import Group, begin_sum_of_parts, on_first, used_in_parts
from moepass.lowering.ep.schedule import Beside
from moepass.lowering.ep.settings import ANY, Settings, Tokens, averaged
from moepass.lowering.forms import ALL_GATHER, ALL_TO_ALL, HIERARCHICAL, LOCAL, REPLICATED
from moepass.ops import autocast_is_on

#: Forms that keep every pair.
DROPLESS: Mapping[str, Callable[[Tokens, ExpertArgs, Settings, Beside], Tensor]] = {
    REPLICATED: replicated.run,
    ALL_GATHER: all_gather.run,
    ALL_TO_ALL: all_to_all.run_exact,
    HIERARCHICAL: all_to_all.run_two_level,
}


def run(
    given: Tokens, args: ExpertArgs, settings: Settings, shared: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the experts of all ranks; ``shared``: nothing, or the operands ``x, w_in, w_out`` of a dense expert."""
    _check(args, settings)
    if settings.mean and settings.form != REPLICATED:
        args = averaged(args, settings.ranks)
    dropped = given.index_TK.new_zeros((), dtype=torch.int64)
    shared_TD = _nothing(given.x_TD)
    device = given.x_TD.device.type
    autocast = torch.autocast(device) if autocast_is_on(device) else contextlib.nullcontext()

    def beside() -> None:
        nonlocal shared_TD
        if shared:
            with autocast:  # as it would run outside the op
                shared_TD = _shared(shared, args)

    def build(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
        nonlocal dropped
        tokens, args = _sliced(Tokens(x_TD, index_TK, weight_TK), args, settings.tp)
        if settings.form == LOCAL:
            beside()
            y_TD = eager.run(*tokens, args)
        elif settings.buffer_factor:
            y_TD, dropped = all_to_all.run_buffered(tokens, args, settings, beside)
        else:
            y_TD = DROPLESS[settings.form](tokens, args, settings, beside)
        return y_TD if settings.tp is None else begin_sum_of_parts(y_TD, settings.tp).wait()

    y_TD = in_compute_dtype(build, given.x_TD, given.index_TK, given.weight_TK, args)
    return y_TD, dropped, shared_TD


def _check(args: ExpertArgs, settings: Settings) -> None:
    """Raises ``BadOption`` for what would be left undone without a word."""

    def refuse(name: str, detail: str) -> errors.BadOption:
        return errors.BadOption(name=name, value=getattr(settings, name), detail=detail)

    form = settings.form
    if form not in (LOCAL, *DROPLESS):
        raise refuse("form", f"the forms are {', '.join((LOCAL, *DROPLESS))}")
    if settings.buffer_factor and form != ALL_TO_ALL:
        raise refuse("buffer_factor", f"only form={ALL_TO_ALL!r} has a buffer")
    if args.capacity_factor and form == HIERARCHICAL:
        raise refuse("form", "a capacity counts rows in the order of the ranks, which two steps do not keep")
    if settings.chunks > 1 and args.capacity_factor and form != REPLICATED:
        raise refuse("chunks", "a capacity counts the tokens of all chunks together; leave them whole")


def _sliced(given: Tokens, args: ExpertArgs, tp: Group | None) -> tuple[Tokens, ExpertArgs]:
    """What the ranks of ``tp`` use in parts, and the bias that only one of them adds."""
    if tp is None:
        return given, args
    x_TD, weight_TK = used_in_parts(given.x_TD, tp), used_in_parts(given.weight_TK, tp)
    b_out = None if args.b_out is None else on_first(args.b_out, tp)
    return Tokens(x_TD, given.index_TK, weight_TK), replace(args, b_out=b_out)


def _shared(operands: Sequence[Tensor], args: ExpertArgs) -> Tensor:
    """``moepass::feed_forward`` with the experts' activation and dropout."""
    x, w_in, w_out = operands
    h = pointwise.apply(args.activation, F.linear(x, w_in))
    return F.linear(F.dropout(h, args.dropout) if args.dropout > 0.0 else h, w_out)


def _nothing(like: Tensor) -> Tensor:
    """The third result where there is no shared expert."""
    return like.new_zeros((0, like.shape[1]))


def shapes(
    given: Tokens, args: ExpertArgs, settings: Settings, shared: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Results of the right shape, dtype and ``requires_grad``, on fake operands: what Dynamo wants to know.

    Sizes that depend on data stay inside the op, and must not show up as unused symbols of Dynamo's graph.
    """
    if reads_host(settings):
        _compat.pretend_host_read(given.x_TD)
    device = given.x_TD.device.type
    dtype = torch.get_autocast_dtype(device) if autocast_is_on(device) else given.x_TD.dtype
    operands = (given.x_TD, given.weight_TK, args.w_in, args.w_out, args.b_in, args.b_out)
    linked = sum((t.sum() for t in operands if t is not None), torch.zeros((), device=given.x_TD.device))
    dropped = given.index_TK.new_zeros((), dtype=torch.int64)
    shared_TD = _shared(shared, args) if shared else _nothing(given.x_TD)
    return (torch.zeros_like(given.x_TD) + linked).to(dtype), dropped, shared_TD


def reads_host(settings: Settings) -> bool:
    """Whether the form synchronises with the host."""
    if settings.form in (ALL_TO_ALL, HIERARCHICAL) and not settings.buffer_factor:
        return True
    return settings.form not in (LOCAL, REPLICATED) and settings.tokens == ANY
