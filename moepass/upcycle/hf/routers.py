"""How a router starts: ``ROUTERS`` holds every way by its name on the command line.

Contract
    in    a ``Plan``, the block's name, D; for ways that are made from data, the rows
    out   ``router_weight [E, D]``, drawn in float32 by (seed, name) alone and then cast
A way is a function ``(plan, name, D) -> rows`` of E rows, or E/G where virtual groups tie G of them; to add one that
needs no data, add it to ``ROUTERS``; one whose rows ``hf.arrange`` makes belongs into ``FROM_DATA``.
All but ``zero`` give logits of standard deviation ``router_std`` on inputs of root mean square 1, at any width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moepass.nn.router import LOGIT_STD
from moepass.upcycle.init import router_rows
from moepass.upcycle.one_expert import generator

if TYPE_CHECKING:
    from moepass.upcycle.hf.recipe import Plan

Rows = Callable[["Plan", str, int], Tensor]


def router_weight(plan: Plan, name: str, D: int, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """Weight ``[E, D]`` of the router of the block ``name``; ``rows [E, D]``: those made from data, if any."""
    if plan.zero_router:
        return torch.zeros(plan.recipe.experts, D, dtype=dtype)
    if rows is None:
        rows = ROUTERS[plan.recipe.router](plan, name, D)
    return rows.repeat_interleave(plan.recipe.experts // len(rows), 0).to(dtype)


def _orthogonal(plan: Plan, name: str, D: int) -> Tensor:
    """Rows of length router_std, evenly spread: what ``upcycle.init`` gives for the same seed and name."""
    return router_rows(plan.spec, plan.init, name, torch.empty(0, D)) * (plan.recipe.router_std / LOGIT_STD)


def _normal(plan: Plan, name: str, D: int) -> Tensor:
    """N(0, router_std/sqrt(D)); Sparse Upcycling draws N(0, 0.02) at any width."""
    return torch.randn(_untied(plan), D, generator=_source(plan, name)) * (plan.recipe.router_std / math.sqrt(D))


def _uniform(plan: Plan, name: str, D: int) -> Tensor:
    """Uniform with the standard deviation of ``normal`` (the runs of Drop-Upcycling use 0.02 at any width)."""
    half = math.sqrt(3.0) * plan.recipe.router_std / math.sqrt(D)
    return (2.0 * torch.rand(_untied(plan), D, generator=_source(plan, name)) - 1.0) * half


def _zero(plan: Plan, _name: str, D: int) -> Tensor:
    return torch.zeros(plan.recipe.experts, D)


def _not_here(plan: Plan, name: str, _D: int) -> Tensor:
    raise AssertionError(f"the rows of {plan.recipe.router!r} for {name} come from data")


def _source(plan: Plan, name: str) -> torch.Generator:
    return generator(plan.recipe.seed, f"{name}/router")


def _untied(plan: Plan) -> int:
    recipe = plan.recipe
    return recipe.experts // (recipe.granularity if recipe.method == "virtual-groups" else 1)


ROUTERS: dict[str, Rows] = {
    "orthogonal": _orthogonal,
    "normal": _normal,
    "uniform": _uniform,
    "zero": _zero,
    "centroids": _not_here,
    "prompts": _not_here,
}
#: Ways whose rows ``hf.arrange`` makes of the neurons that an expert has; ``hf.prompts`` makes those of ``prompts``.
FROM_DATA = frozenset({"centroids"})
