"""Models whose experts live on several ranks train as on one: outputs, gradients of every parameter, three steps.

A case is a number of ranks, a form, a capacity and a way to run; in each rank it is fed several routings, and compared
with one rank that has all tokens and all experts, in float32.  Run eagerly, every case of the product is tested: four
processes serve P = 4, 2 and 1.  Compiled, one case costs seconds in every process, so that the suite takes some of them
(each form, P, capacity and routing at least once) and ``make ep-matrix`` all of them, one launch for each P.
Backend of the compiled cases is ``aot_eager``: collectives, gradients and plans are those of Inductor.

Optimizers, by routing: SGD with momentum, and Adam with eps=1e-3.  With its usual 1e-8, Adam makes whole steps of
gradients that are nothing but rounding, and no two orders of summation would agree.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable
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
ADAM = functools.partial(torch.optim.Adam, lr=0.03, eps=1e-3)
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "balanced": ADAM,
    "one_rank_gets_all": functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    "a_rank_has_no_tokens": ADAM,
}
#: Ranks of the launches that test every compiled case; none in the suite.
WHOLE = [int(P) for P in os.environ.get("MOEPASS_EP_MATRIX", "").split(",") if P]


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


def product(P: int, run: str) -> list[Case]:
    """Form x capacity; hierarchical has none."""
    found = [Case(P, *form, cf, run) for form, cf in itertools.product(FORMS, (None, 0.8))]
    return [*found, Case(P, "hierarchical", None, None, run)]


def eager_cases() -> list[Case]:
    """All of them, and one of four ranks that is compiled: the processes are there."""
    few = [] if WHOLE else [Case(4, "all_to_all", None, None, "aot_eager")]
    return [*(case for P in (4, 2, 1) for case in product(P, "eager")), *few]


def compiled_cases() -> dict[int, list[Case]]:
    """By the number of processes that serve them."""
    if WHOLE:
        return {P: product(P, "aot_eager") for P in WHOLE}
    few = [(1, "all_gather", None, 0.8), (2, "hierarchical", None, None), (2, "replicated", None, 0.8),
           (2, "all_gather", None, None), (2, "all_to_all", None, 0.8), (2, "all_to_all", 8.0, None)]  # fmt: skip
    return {2: [Case(*each, "aot_eager") for each in few]}


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
        sizes = [(S, 0, 3, 5)[r] for r in range(case.P)] if case.P > 1 and case.form != "replicated" else [0] * case.P
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
    ours, theirs = (OPTIMIZERS[routing](m.parameters()) for m in (model, reference))
    worst = 0.0
    for step in range(3):
        each = batches(case, routing, step)
        if case.form == "replicated":
            each = [each[0]] * case.P
            everything, own, total = each[0], slice(0, None), len(each[0])
        else:
            everything, total = torch.cat(each), sum(map(len, each))
            starts = [0, *itertools.accumulate(map(len, each))]
            own = slice(starts[rank], starts[rank + 1])
        scale = 1.0 if case.form == "replicated" else case.P
        got = step_of(model, run, each[rank], scale / max(total, 1), ours, mesh)
        wanted = step_of(reference, reference, everything, 1 / max(total, 1), theirs, None)
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
    """Compiled code of fixed shapes is not compiled again for other values, but where every case is tested."""
    return ROUTINGS if case.run == "eager" or case.form == "all_to_all" or WHOLE else ROUTINGS[:2]


@functools.cache
def mesh_of(P: int, flat: bool) -> DeviceMesh:
    """Of so many of the processes, the others doing the same in groups of their own; two nodes where P allows it."""
    rest = torch.distributed.get_world_size() // P
    if flat:
        return init_device_mesh("cpu", (rest, P), mesh_dim_names=("rest", "ep"))["ep"]
    nodes = min(P, 2)
    return init_device_mesh("cpu", (rest, nodes, P // nodes), mesh_dim_names=("rest", "node", "local"))["node", "local"]


def every_case(rank: ranks.Rank) -> None:
    cases = compiled_cases()[rank.size] if rank.arguments == ["compiled"] else eager_cases()
    found = {c.name: errors_of(c, rank.number % c.P, mesh_of(c.P, c.form != "hierarchical")) for c in cases}
    last = moepass.last_plan() if rank.arguments else None
    rank.save((found, last and [(s.id, s.status, s.lowering, s.hint) for s in last.sites]))


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """What every rank found."""
    return [errors for errors, _ in ranks.spawn(__file__, 4, tmp_path_factory.mktemp("eager"))]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """By the number of processes: what every rank found, and its last plan.  A launch starts when it is asked for."""

    @functools.cache
    def launch(size: int):
        return ranks.spawn(__file__, size, tmp_path_factory.mktemp("compiled"), "compiled", timeout=1500)

    return launch


@pytest.mark.parametrize(
    ("case", "routing"), [(c, r) for c in eager_cases() for r in routings(c)], ids=lambda v: getattr(v, "name", v)
)
def test_ranks_train_as_one(eager, case, routing):
    for errors in eager:
        assert errors[case.name][routing] < TOLERANCE


@pytest.mark.parametrize(
    ("size", "case", "routing"),
    [(size, c, r) for size, cases in compiled_cases().items() for c in cases for r in routings(c)],
    ids=lambda v: getattr(v, "name", v),
)
def test_compiled_ranks_train_as_one(compiled, size, case, routing):
    for errors, _ in compiled(size):
        assert errors[case.name][routing] < TOLERANCE


@pytest.mark.skipif(bool(WHOLE), reason="it is about the last of the suite's cases")
def test_the_plan_names_the_form(compiled):
    hint = "expert parallel over 2 ranks: all_to_all, buffer_factor=8; E is this rank's"
    for _, sites in compiled(2):
        assert sites == [("moe", "lowered", "all_to_all", hint)]


if __name__ == "__main__":
    ranks.join(every_case, timeout=300)
