"""Models whose experts live on several ranks train as on one: outputs, gradients of every parameter, three steps.

Four processes serve P = 4, 2 and 1.  A case is a form, a capacity and a way to run; in each rank it is fed several
routings, and compared with one rank that has all tokens and all experts.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import ranks
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import moepass
from moepass.parallel.gradients import average_gradients, clip_grad_norm_
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec

S, E, K, D, F = 6, 8, 2, 8, 8
ROUTINGS = ("balanced", "one_rank_gets_all", "a_rank_has_no_tokens")
TOLERANCE = 1e-5


class Case(NamedTuple):
    P: int
    form: str
    buffer_factor: float | None
    capacity_factor: float | None
    run: str = "eager"

    @property
    def name(self) -> str:
        """What pytest shows."""
        return "-".join(map(str, self))


FORMS = [("replicated", None), ("all_gather", None), ("all_to_all", None), ("all_to_all", 8.0)]


def cases() -> list[Case]:
    found = [Case(4, *form, cf) for form, cf in itertools.product(FORMS, (None, 0.8))]
    found += [Case(2, *form, cf) for form, cf in zip(FORMS, (0.8, None, 0.8, None), strict=True)]
    return [*found, Case(1, *FORMS[2], 0.8), Case(4, "hierarchical", None, None)]


def compiled_cases() -> list[Case]:
    """In a group of their own, for compiling costs seconds: two ranks."""
    return [Case(2, *form, None, "aot_eager") for form in FORMS]


class Net(nn.Module):
    """Something replicated in front of the experts, so that gradients have to pass through them."""

    def __init__(self, capacity_factor: float | None) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.moe = MoESpec(
            router=RouterSpec(top_k=K),
            experts=ExpertSpec(num_experts=E, intermediate_size=F, activation="swiglu", bias_in=True, bias_out=True),
            dispatch=DispatchSpec(capacity_factor=capacity_factor),
        ).build(D)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.inner(x)
        return h + self.moe(h)


def model_of(case: Case, routing: str) -> Net:
    torch.manual_seed(0)
    model = Net(case.capacity_factor)
    with torch.no_grad():
        if routing == "one_rank_gets_all":
            model.moe.router.weight[:, 0] = -4.0
            model.moe.router.weight[:2, 0] = 4.0
    return model


def batches(case: Case, routing: str, step: int) -> list[Tensor]:
    """The tokens of every rank."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(case.P, S, D, generator=generator)
    if routing == "one_rank_gets_all":
        x[..., 0] = 3.0
    sizes = [S] * case.P
    if routing == "a_rank_has_no_tokens":
        sizes = [(S, 0, 3, 5)[r] for r in range(case.P)]
    return [x[r, :size] for r, size in enumerate(sizes)]


def step_of(model: nn.Module, run, x: Tensor, scale: float, optimizer, mesh: DeviceMesh | None) -> list[Tensor]:
    """One step: output, norm and gradients, in the order of the parameters."""
    optimizer.zero_grad()
    y = run(x)
    (torch.linspace(-1, 1, D) * y.square()).sum().mul(scale).backward()
    if mesh is None:
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    else:
        average_gradients(model, mesh)
        norm = clip_grad_norm_(model.parameters(), 1.0)
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    return [y.detach(), norm, *grads]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def error(case: Case, routing: str, rank: int, model, run, mesh: DeviceMesh) -> float:
    """Largest difference from one rank, relative to the largest value of each tensor where that is above 1."""
    reference = model_of(case, routing)
    with torch.no_grad():
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            local = p.to_local() if isinstance(p, DTensor) else p
            local.copy_(q.chunk(case.P)[rank] if isinstance(p, DTensor) else q)
    # Not Adam: it makes whole steps of gradients that are nothing but rounding.
    ours, theirs = (torch.optim.SGD(m.parameters(), 0.5, momentum=0.9) for m in (model, reference))
    worst = 0.0
    for step in range(3):
        each = batches(case, routing, step)
        if case.form == "replicated":
            each = [each[0]] * case.P
            everything, own, total = each[0], slice(0, None), S
        else:
            everything, total = torch.cat(each), sum(map(len, each))
            starts = [0, *itertools.accumulate(map(len, each))]
            own = slice(starts[rank], starts[rank + 1])
        scale = 1.0 if case.form == "replicated" else case.P
        got = step_of(model, run, each[rank], scale / total, ours, mesh)
        wanted = step_of(reference, reference, everything, 1 / total, theirs, None)
        wanted[0] = wanted[0][own]
        pairs = list(zip(got, wanted, strict=True))
        pairs += [(p.detach(), q.detach()) for p, q in zip(model.parameters(), reference.parameters(), strict=True)]
        for a, b in pairs:
            a = whole(a)
            assert a.shape == b.shape
            if a.numel():
                worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1)))
    return worst


def errors_of(case: Case, rank: int, mesh: DeviceMesh) -> dict[str, float]:
    torch._dynamo.reset()
    model = model_of(case, "balanced")
    flat = case.form != "hierarchical"
    # Blocks of fixed size need a number that no rank's T exceeds.
    tokens = S if case.buffer_factor else None
    moepass.parallelize(model, mesh, "ep" if flat else ("node", "local"), form=case.form,
                        buffer_factor=case.buffer_factor, tokens=tokens)  # fmt: skip
    run = model
    if case.run != "eager":
        run = torch.compile(model, backend="moepass", fullgraph=True, options={"inner": case.run, "strict": True})
    return {routing: error(case, routing, rank, model, run, mesh) for routing in routings(case)}


def routings(case: Case) -> tuple[str, ...]:
    """Compiled code of fixed shapes is not compiled again for other values."""
    return ROUTINGS if case.run == "eager" or case.form == "all_to_all" else ROUTINGS[:2]


def every_case(rank: ranks.Rank) -> None:
    if rank.size == 2:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
        found = {case.name: errors_of(case, rank.number, mesh) for case in compiled_cases()}
        rank.save((found, [(s.id, s.status, s.lowering, s.hint) for s in moepass.last_plan().sites]))
        return
    worlds = {
        4: init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)),
        2: init_device_mesh("cpu", (2, 2), mesh_dim_names=("rest", "ep"))["ep"],
        1: init_device_mesh("cpu", (4, 1), mesh_dim_names=("rest", "ep"))["ep"],
    }
    two_levels = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    found = {}
    for case in cases():
        mesh = two_levels if case.form == "hierarchical" else worlds[case.P]
        found[case.name] = errors_of(case, rank.number % case.P, mesh)
    rank.save(found)


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """What every rank found."""
    return ranks.spawn(__file__, 4, tmp_path_factory.mktemp("eager"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What every rank found, and its last plan."""
    return ranks.spawn(__file__, 2, tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_ranks_train_as_one(eager, case, routing):
    for errors in eager:
        assert errors[case.name][routing] < TOLERANCE


@pytest.mark.parametrize(
    ("case", "routing"), [(c, r) for c in compiled_cases() for r in routings(c)], ids=lambda v: getattr(v, "name", v)
)
def test_compiled_ranks_train_as_one(compiled, case, routing):
    for errors, _ in compiled:
        assert errors[case.name][routing] < TOLERANCE


def test_the_plan_names_the_form(compiled):
    hint = "expert parallel over 2 ranks: all_to_all, buffer_factor=8; E is this rank's"
    for _, sites in compiled:
        assert sites == [("moe", "lowered", "all_to_all", hint)]


if __name__ == "__main__":
    ranks.join(every_case)
