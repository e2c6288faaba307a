"""Every form of expert parallelism against one rank with all tokens and all experts, in float64.

Four processes serve P = 4, P = 2 (two groups of two) and P = 1: every case runs in each rank and is compared there.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moepass import ops, reference
from moepass.lowering.ep.settings import ANY, EQUAL
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec

T, K, E, D, F = 6, 2, 8, 4, 5
ACTIVATION = "silu(g)*u"
ROUTINGS = ("random", "one_rank_gets_all", "a_rank_has_no_tokens", "nobody_anywhere")


class Case(NamedTuple):
    P: int
    form: str
    routing: str
    capacity_factor: float | None = None
    drop_policy: str = "position"
    buffer_factor: float | None = None
    tokens: int = ANY

    @property
    def name(self) -> str:
        """What pytest shows."""
        return "-".join(str(field) for field in self if field is not None)


def cases() -> list[Case]:
    """Form x routing x capacity; hierarchical has none."""
    forms = [("replicated", None), ("all_gather", None), ("all_to_all", None), ("all_to_all", 8.0)]
    drops = [(None, "position"), (0.7, "position"), (0.7, "probability")]
    found = [
        Case(P, form, routing, cf, policy, factor)
        for P, (form, factor), routing, (cf, policy) in itertools.product((2, 4), forms, ROUTINGS, drops)
        if (routing != "nobody_anywhere" or cf is None) and (P == 4 or policy == "position")
    ]
    found += [Case(1, form, "random", 0.7, "position", factor) for form, factor in forms]
    found += [Case(4, "hierarchical", routing) for routing in ROUTINGS]
    for form, factor in [("all_gather", None), ("all_to_all", 8.0)]:
        found.append(Case(4, form, "a_rank_has_no_tokens", None, "position", factor, T + 1))
        found.append(Case(4, form, "random", 0.7, "probability", factor, EQUAL))
    return found


class Whole(NamedTuple):
    """The operands of all ranks; tokens of rank r are ``x[starts[r] : starts[r + 1]]``."""

    x: Tensor
    index: Tensor
    weight: Tensor
    experts: list[Tensor]
    starts: list[int]


def whole(case: Case) -> Whole:
    generator = torch.Generator().manual_seed(case.P)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    each = [T] * case.P
    if case.routing == "a_rank_has_no_tokens":
        each = [(T, 0, 3, T)[rank] for rank in range(case.P)]
    if case.form == "replicated":
        each = each[:1] if case.routing != "a_rank_has_no_tokens" else [0]
    total = sum(each)
    index = torch.rand(total, E, generator=generator).argsort(1)[:, :K]
    index[torch.rand(total, K, generator=generator) < 0.2] = E
    if case.routing == "one_rank_gets_all":
        index = torch.tensor([[0, 1]]).repeat(total, 1)
    if case.routing == "nobody_anywhere":
        index.fill_(E)
    experts = [draw(E, 2 * F, D), draw(E, D, F), draw(E, 2 * F), draw(E, D)]
    weight = torch.rand(total, K, generator=generator, dtype=torch.float64)
    return Whole(draw(total, D), index, weight, experts, [0, *itertools.accumulate(each)])


def upstream(y: Tensor) -> Tensor:
    return torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view_as(y)


def alone(case: Case, data: Whole) -> list[Tensor]:
    """Output and gradients of the reference on all tokens."""
    leaves = [t.clone().requires_grad_() for t in (data.x, data.weight, *data.experts)]
    spec = MoESpec(
        experts=ExpertSpec(num_experts=E, intermediate_size=F, activation=ACTIVATION),
        dispatch=DispatchSpec(capacity_factor=case.capacity_factor, drop_policy=case.drop_policy),
    )
    routing, weights = reference.Routing(data.index, leaves[1]), reference.ExpertWeights(*leaves[2:])
    y = reference.experts(leaves[0], routing, weights, spec)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream(y))]


def together(case: Case, data: Whole, rank: int, groups: list[str]) -> tuple[list[Tensor], int]:
    """This rank's share of the same, and how many pairs it dropped for lack of room."""
    own = slice(0, None) if case.form == "replicated" else slice(data.starts[rank], data.starts[rank + 1])
    mine = slice(rank * E // case.P, (rank + 1) * E // case.P)
    leaves = [t.clone().requires_grad_() for t in (data.x[own], data.weight[own], *(w[mine] for w in data.experts))]
    y, dropped = ops.experts_ep(
        leaves[0], data.index[own], leaves[1], *leaves[2:], activation=ACTIVATION, groups=groups, form=case.form,
        capacity_factor=case.capacity_factor, drop_policy=case.drop_policy, buffer_factor=case.buffer_factor,
        tokens=case.tokens, mean=False,
    )  # fmt: skip
    grads = torch.autograd.grad(y, leaves, upstream(data.x)[own])
    return [y.detach(), *grads], int(dropped)


def share(values: list[Tensor], case: Case, data: Whole, rank: int) -> list[Tensor]:
    own = slice(0, None) if case.form == "replicated" else slice(data.starts[rank], data.starts[rank + 1])
    mine = slice(rank * E // case.P, (rank + 1) * E // case.P)
    return [*(v[own] for v in values[:3]), *(v[mine] for v in values[3:])]


def error(case: Case, rank: int, groups: list[str]) -> tuple[float, int]:
    data = whole(case)
    got, dropped = together(case, data, rank, groups)
    wanted = share(alone(case, data), case, data, rank)
    assert [t.shape for t in got] == [t.shape for t in wanted]
    return max((float((a - b).abs().max()) if a.numel() else 0.0) for a, b in zip(got, wanted, strict=True)), dropped


def every_case(rank: ranks.Rank) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    node, local = (mesh[name].get_group() for name in ("node", "local"))
    world = dist.group.WORLD
    assert world is not None
    ones = [dist.new_group([r]) for r in range(4)]
    by_size = {4: [world.group_name], 2: [local.group_name], 1: [ones[rank.number].group_name]}
    found: dict[str, Any] = {}
    for case in cases():
        groups = [node.group_name, local.group_name] if case.form == "hierarchical" else by_size[case.P]
        found[case.name] = error(case, rank.number % case.P, groups)
    found["dropping"] = dropping(rank.number, [world.group_name])
    rank.save(found)


def dropping(rank: int, groups: list[str]) -> tuple[int, Tensor, Tensor, Tensor]:
    """A buffer of three rows for each rank: what is dropped, the pairs' weights' gradient, and the routing."""
    case = Case(4, "all_to_all", "random", None, "position", 1.0, EQUAL)
    data = whole(case)
    got, dropped = together(case, data, rank, groups)
    return dropped, got[0], got[2], data.index[data.starts[rank] : data.starts[rank + 1]]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every rank found."""
    return ranks.spawn(__file__, 4, tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_ranks_compute_outputs_and_gradients_of_one_rank(found, case):
    for rank in found:
        error, dropped = rank[case.name]
        assert error < 1e-12
        assert dropped == 0, "the factor leaves room for all"


def test_a_full_buffer_drops_in_expert_order_and_counts(found):
    C = 3  # ceil(1.0 * 6 * 2 / 4) rows for each rank
    for dropped, y, grad_weight, index in (rank["dropping"] for rank in found):
        order = sorted(((int(e), r) for r, e in enumerate(index.reshape(-1)) if e < E))
        kept = {r for to in range(4) for _, r in [p for p in order if p[0] // 2 == to][:C]}
        lost = [r for _, r in order if r not in kept]
        assert dropped == len(lost)
        alive = grad_weight.reshape(-1).nonzero().flatten().tolist()
        assert set(alive) == kept
        for t in range(T):
            if not kept & {K * t, K * t + 1}:
                assert y[t].abs().sum() == 0
    assert sum(rank["dropping"][0] for rank in found) > 0


if __name__ == "__main__":
    ranks.join(every_case)
