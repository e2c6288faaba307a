"""Aux-loss-free load balancing: experts with too many tokens become a little less attractive after every step.

``b_e += rate * sign(mean(c) - c_e)`` with the counts c of the whole batch (Wang et al. 2024, DeepSeek-V3; OLMo-core's
and Automodel's rule).  The bias moves the choice of experts and never their weights, so no gradient is involved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moepass import errors
from moepass.nn.named import named
from moepass.spec import RouterSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from moepass.nn.router import Router


def bias_step(count_E: Tensor, spec: RouterSpec) -> Tensor:
    """What is added to the bias, float32 ``[E]``; nothing where no token was counted."""
    load_E = count_E.double()  # counts are integers and their mean is not
    step_E = torch.sign(load_E.mean() - load_E)
    if spec.bias_centred:
        step_E = step_E - step_E.mean()
    return (spec.bias_update_rate * step_E).float()


def total_counts(counts: Sequence[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """The counts of all routers summed over the group by one all-reduce; the arguments stay as they are."""
    whole = torch.cat(list(counts))
    if group is not None or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        torch.distributed.all_reduce(whole, group=group)
    return list(whole.split([c.shape[0] for c in counts]))


def routers(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """``(name, router)`` of a model, each once; compiled and wrapped models have their original's names."""
    from moepass.nn.router import Router

    return named(model, Router)


def post_batch(model: nn.Module, *, dry_run: bool = False, group: ProcessGroup | None = None) -> dict[str, Tensor]:
    """``Router.post_batch`` of all routers of a model, by one all-reduce: ``{name: step [E]}``.

    Call it after ``optimizer.step()`` on every rank that holds the same routers; give ``group`` where other ranks hold
    other layers (pipeline stages).  Raises ``NoRouters`` for a model without any.
    """
    found = dict(routers(model))
    if not found:
        raise errors.NoRouters(what="post_batch", where=type(model).__name__)
    counts = {name: r.tokens_per_expert for name, r in found.items() if r.tokens_per_expert is not None}
    if not counts:
        return {}
    totals = total_counts(list(counts.values()), group)
    return {name: found[name].move_bias(c, dry_run=dry_run) for name, c in zip(counts, totals, strict=True)}
