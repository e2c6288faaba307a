"""The body of ``moepass::experts_ep``: from the op's arguments to a form.

Contract
    in    operands of ``moepass::experts`` with this rank's experts (E/P of them), indices of all E; names of the groups
    out   ``(y_TD, dropped)``: dropped, int64 ``[]``, counts this rank's pairs that found no room in a buffer
    Under autocast the experts run, and rows travel, in the autocast dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moepass import _compat
from moepass.lowering.base import ExpertArgs
from moepass.lowering.eager import in_compute_dtype
from moepass.lowering.ep import all_gather, all_to_all, replicated
from moepass.lowering.ep.settings import ANY, Settings, Tokens, averaged
from moepass.ops import autocast_is_on

#: Forms that keep every pair.
DROPLESS: Mapping[str, Callable[[Tokens, ExpertArgs, Settings], Tensor]] = {
    "replicated": replicated.run,
    "all_gather": all_gather.run,
    "all_to_all": all_to_all.run_exact,
    "hierarchical": all_to_all.run_two_level,
}


def run(given: Tokens, args: ExpertArgs, settings: Settings) -> tuple[Tensor, Tensor]:
    """Compute the experts of all ranks."""
    if settings.mean and settings.form != "replicated":
        args = averaged(args, settings.ranks)
    dropped = given.index_TK.new_zeros((), dtype=torch.int64)

    def build(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
        nonlocal dropped
        tokens = Tokens(x_TD, index_TK, weight_TK)
        if settings.buffer_factor:
            y_TD, dropped = all_to_all.run_buffered(tokens, args, settings)
            return y_TD
        return DROPLESS[settings.form](tokens, args, settings)

    return in_compute_dtype(build, given.x_TD, given.index_TK, given.weight_TK, args), dropped


def shapes(given: Tokens, args: ExpertArgs, settings: Settings) -> tuple[Tensor, Tensor]:
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
    return (torch.zeros_like(given.x_TD) + linked).to(dtype), dropped


def reads_host(settings: Settings) -> bool:
    """Whether the form synchronises with the host."""
    if settings.form in ("all_to_all", "hierarchical") and not settings.buffer_factor:
        return True
    return settings.form != "replicated" and settings.tokens == ANY
