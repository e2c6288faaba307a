"""What stands between the start of a collective and the wait for it: traced on a fake group, eager on one, and read."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moepass
from moepass import errors, ops
from moepass.spec import ExpertSpec, MoESpec

D, F, SHARED, E, T = 8, 4, 12, 16, 32
RANKS = 8


@pytest.fixture(scope="module", autouse=True)
def group():
    """Rank 1 of 8 that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=RANKS)
    yield
    dist.destroy_process_group()


def block(mesh=None, dims=("ep",), **options) -> nn.Module:
    torch.manual_seed(0)
    experts = ExpertSpec(num_experts=E, intermediate_size=F, activation="swiglu", shared_intermediate_size=SHARED)
    mesh = mesh or init_device_mesh("cpu", (RANKS,), mesh_dim_names=("ep",))
    return moepass.parallelize(MoESpec(experts=experts).build(D), mesh, dims, **options)


def event(name: str, shapes: list[tuple[object, ...]]) -> str | None:
    """What one op of a graph, or of an eager run, is to these tests."""
    if "wait_tensor" in name:
        return "wait"
    if "c10d_functional" in name:
        return "begin"
    if "grouped" in name:
        return "experts"
    return "shared" if name.startswith("aten.mm") and any(SHARED in s or 2 * SHARED in s for s in shapes) else None


class NotRunError(Exception):
    """Ranks that are not there send nothing that could be computed with."""


def traced(built: nn.Module) -> tuple[list[str], list[str]]:
    """Events of the forward and of the backward graph, in their order; collectives of integers left out."""
    found: list[list[str]] = []

    def read(gm):
        events, rows = [], set()
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            if node.op != "call_function" or not isinstance(value, Tensor):
                continue
            told = event(str(node.target), [tuple(map(_size, value.shape)), *map(_shape, node.args)])
            if told in ("begin", "wait"):
                if not value.is_floating_point() or (told == "wait" and node.args[0] not in rows):
                    continue
                rows.add(node)
            events += [told] if told else []
        found.append(events)

    def not_run(*_):
        raise NotRunError

    def partition(joint, inputs, **options):
        parts = min_cut_rematerialization_partition(joint, inputs, **options)
        for part in parts:
            read(part)
        return parts

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda *_: make_boxed_func(not_run), partition_fn=partition)
    with contextlib.suppress(NotRunError):
        torch.compile(built, backend=backend, fullgraph=True)(torch.randn(T, D, requires_grad=True))
    return found[0], found[1]


def _size(size: object) -> object:
    return size if isinstance(size, int) else str(size)


def _shape(argument: object) -> tuple[object, ...]:
    value = getattr(argument, "meta", {}).get("val")
    return tuple(map(_size, value.shape)) if isinstance(value, Tensor) else ()


def compact(events: list[str]) -> str:
    """Repeated events once."""
    return " ".join(e for i, e in enumerate(events) if i == 0 or events[i - 1] != e)


FORMS = {
    "all_to_all": {},
    "buffer": {"form": "all_to_all", "buffer_factor": 8.0},
    "all_gather": {"form": "all_gather", "tokens": "equal"},
    "hierarchical": {"form": "hierarchical"},
}


def built(form: str, **options) -> nn.Module:
    if form != "hierarchical":
        return block(**FORMS[form], **options)
    grid = init_device_mesh("cpu", (4, 2), mesh_dim_names=("node", "local"))
    return block(grid, ("node", "local"), **FORMS[form], **options)


@pytest.mark.parametrize("form", FORMS)
def test_the_shared_expert_runs_between_dispatch_and_wait(form):
    forward, backward = (compact(events) for events in traced(built(form)))
    assert forward.startswith("begin shared wait"), forward
    assert forward.count("shared") == 1
    assert backward.endswith("begin shared wait"), backward


def test_the_shared_expert_runs_over_the_sum_of_replicated_experts():
    forward, _ = traced(block(form="replicated"))
    assert compact(forward) == "experts begin shared wait"


def test_a_chunk_travels_while_another_is_computed():
    forward, backward = (compact(events) for events in traced(built("buffer", chunks=3)))
    assert forward == ("begin shared begin wait experts begin wait experts begin wait experts begin wait"), (
        "each chunk leaves before its predecessor is computed"
    )
    assert "experts begin experts" not in forward
    assert backward.startswith("begin wait experts begin wait experts"), backward


def test_an_eager_call_has_the_order_of_the_graph():
    one, x = built("buffer"), torch.randn(T, D, requires_grad=True)
    with Record() as forward:
        y = one(x)
    assert compact(forward.events) == "begin shared wait experts begin wait"
    with Record() as backward:
        y.sum().backward()
    assert compact(backward.events) == "begin wait experts begin shared wait"


@pytest.mark.parametrize("form", ["all_gather", "buffer"])
def test_a_recomputed_forward_waits_for_what_it_begins(form):
    one, x = built(form, chunks=2), torch.randn(T, D, requires_grad=True)
    y = checkpoint(one, x, use_reentrant=False)
    with Record() as backward:
        y.sum().backward()
    assert backward.events.count("begin") == backward.events.count("wait") > 0


class Record(TorchDispatchMode):
    """The events of eager calls."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
        if (told := event(str(func), [tuple(t.shape) for t in tensors])) is not None:
            self.events.append(told)
        return out


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"form": "ring"}, "the forms are local, replicated"),
        ({"form": "all_gather", "buffer_factor": 2.0}, "only form='all_to_all' has a buffer"),
        ({"form": "hierarchical", "capacity_factor": 1.0}, "which two steps do not keep"),
        ({"form": "all_gather", "capacity_factor": 1.0, "chunks": 2}, "leave them whole"),
    ],
)
def test_the_op_refuses_what_it_would_leave_undone(told, why):
    routing = torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1)
    weights = torch.randn(E // RANKS, 2 * F, D), torch.randn(E // RANKS, D, F)
    groups = [dist.group.WORLD.group_name]
    with pytest.raises(errors.BadOption, match=why):
        ops.experts_ep(torch.randn(T, D), *routing, *weights, activation="swiglu", groups=groups, **told)
