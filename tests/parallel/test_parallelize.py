"""``moepass.parallelize`` without other ranks: what it refuses, and what 64 would send, traced on a fake group."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import moepass
from moepass import errors
from moepass.parallel.canonical import canonical
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec

D, F, E, K, T = 8, 8, 64, 2, 16
RANKS = 64


@pytest.fixture(scope="module", autouse=True)
def group():
    """Rank 5 of 64 that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=RANKS)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def mesh(group):
    return init_device_mesh("cpu", (RANKS,), mesh_dim_names=("ep",))


@pytest.fixture(scope="module")
def grid(group):
    return init_device_mesh("cpu", (16, 2, 2), mesh_dim_names=("rest", "node", "local"))


def model(E: int = E, **parts) -> nn.Module:
    experts = ExpertSpec(num_experts=E, intermediate_size=F, activation="swiglu")
    return nn.Sequential(MoESpec(experts=experts, **parts).build(D))


# --- placement -------------------------------------------------------------------------------------------------------


def test_experts_become_dtensors_and_nothing_else_does(mesh):
    dense = model(128)
    rows = dense[0].w_in.detach()[10:12].clone()
    sharded = moepass.parallelize(dense, mesh)
    assert sharded is dense
    w_in = sharded[0].w_in
    assert isinstance(w_in, DTensor)
    assert w_in.placements == (Shard(0),)
    assert w_in.shape == (128, 2 * F, D)
    assert torch.equal(w_in.to_local(), rows), "rank 5 holds experts 10 and 11"
    assert type(sharded[0].router.weight) is nn.Parameter


def test_a_model_on_meta_is_sharded_without_memory(mesh):
    with torch.device("meta"):
        sharded = moepass.parallelize(model(), mesh)
    assert sharded[0].w_in.to_local().is_meta
    assert sharded[0].w_in.to_local().shape == (1, 2 * F, D)


def test_slices_under_ddp_are_stored_as_without_it(grid):
    sliced = moepass.parallelize(model(), grid, None, tp="local")
    around = DistributedDataParallel(sliced, process_group=grid.get_group("rest"))
    for run in (sliced, around):
        stored = canonical(run, {"model": get_model_state_dict(run)})["model"]
        assert stored["0.w_in"].shape == (E, 2 * F, D)


# --- refusals, before any collective ---------------------------------------------------------------------------------


def refused(error, text, *args, **kwargs):
    built = kwargs.pop("model", None) or model()
    with pytest.raises(error, match=text):
        moepass.parallelize(built, *args, **kwargs)
    assert not any(isinstance(p, DTensor) for p in built.parameters())


def test_uneven_experts_are_refused_with_both_numbers(mesh):
    refused(errors.NotDivisible, "num_experts=10 of 0 is not divisible by .*=64", mesh, model=model(10))


def test_an_uneven_width_is_refused_with_both_numbers(mesh):
    refused(errors.NotDivisible, "intermediate_size=8 of 0 is not divisible by .* TP dimension=64", mesh, None, tp="ep")


def test_chunks_that_would_change_the_result_are_refused(mesh):
    capacity = DispatchSpec(capacity_factor=1.0)
    refused(errors.NotParallel, "chunks=2: its capacity counts", mesh, chunks=2, model=model(dispatch=capacity))
    refused(errors.NotParallel, "less than 32, drops other rows", mesh, chunks=2, buffer_factor=2.0)
    refused(errors.BadOption, "at least 1", mesh, chunks=0)
    refused(errors.BadOption, "no tokens travel", mesh, None, tp="ep", chunks=2)


def test_layouts_that_mean_nothing_are_refused(mesh, grid):
    refused(errors.BadMesh, "neither ep nor tp", mesh, None)
    refused(errors.BadMesh, "named twice", mesh, "ep", tp="ep")
    refused(errors.BadOption, "nothing to choose", mesh, None, tp="ep", form="all_to_all")
    refused(errors.BadOption, "use one of the two", grid, "node", tp="local", fsdp="rest")


def test_a_wrong_mesh_is_refused(mesh, grid):
    refused(errors.BadMesh, "no dimension 'tp'; choose among ep", mesh, "tp")
    refused(errors.BadMesh, "not a DeviceMesh", "ep=8")
    refused(errors.BadMesh, "two dimensions", grid, "node", form="hierarchical")
    refused(errors.BadMesh, "named twice", mesh, "ep", fsdp="ep")


def test_options_that_mean_nothing_are_refused(mesh):
    refused(errors.BadOption, "the forms are", mesh, form="ring")
    refused(errors.BadOption, "belongs to form='all_to_all'", mesh, form="all_gather", buffer_factor=1.0)


def test_what_ranks_would_compute_differently_is_refused(mesh, grid):
    capacity = DispatchSpec(capacity_factor=1.0)
    chooses = RouterSpec(choice="expert", normalize=None)
    refused(errors.NotParallel, "choose among the tokens", mesh, model=model(router=chooses, dispatch=capacity))
    on_input = RouterSpec(weight_on="input")
    refused(errors.NotParallel, "counted before", mesh, model=model(router=on_input, dispatch=capacity))
    refused(errors.NotParallel, "order of the ranks", grid, ("node", "local"), model=model(dispatch=capacity))


def test_models_without_blocks_and_sharded_ones_are_refused(mesh):
    refused(errors.NotParallel, "moepass.convert first", mesh, model=nn.Sequential(nn.Linear(D, D)))
    sharded = moepass.parallelize(model(), mesh)
    with pytest.raises(errors.NotParallel, match="sharded already"):
        moepass.parallelize(sharded, mesh)


def test_more_tokens_than_were_promised_are_refused(mesh):
    sharded = moepass.parallelize(model(), mesh, form="all_gather", tokens=T - 1)
    with pytest.raises(errors.BadOption, match=f"this rank has {T} tokens"):
        sharded(torch.randn(T, D))


# --- what would be sent ----------------------------------------------------------------------------------------------


class NotRunError(Exception):
    """Ranks that are not there send nothing that could be computed with."""


def not_run(*_):
    raise NotRunError


def collectives(built: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """Collectives and host reads of a compiled forward, with the shapes of their results."""
    found = []

    def look(gm, _):
        for node in gm.graph.nodes:
            name = str(node.target)
            if node.op == "call_function" and ("c10d" in name or "local_scalar" in name) and "wait" not in name:
                value = node.meta["val"]
                shape = tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else ()
                found.append((name.split(".")[1], shape))
        return make_boxed_func(not_run)

    torch._dynamo.reset()
    built.requires_grad_(False)
    with contextlib.suppress(NotRunError):
        torch.compile(built, backend=aot_autograd(fw_compiler=look), fullgraph=True)(torch.randn(T, D))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 64])
def test_exact_all_to_all_sends_counts_rows_and_results(ranks, group):
    part = init_device_mesh("cpu", (RANKS // ranks, ranks), mesh_dim_names=("rest", "ep"))
    found = collectives(moepass.parallelize(model(), part))
    sent = [shape for name, shape in found if name == "all_to_all_single"]
    assert sent[0] == ("64",), "a count for each expert"
    assert sent[2] == (str(T * K), str(D)), "every routed row comes back once"
    assert len(sent) == 3
    assert sum(name == "_local_scalar_dense" for name, _ in found) == 2 * ranks - 1, "splits; one follows from T"


@pytest.mark.parametrize("factor", [1.0, 64.0])
def test_a_buffer_has_fixed_blocks_and_no_host_read(mesh, factor):
    found = collectives(moepass.parallelize(model(), mesh, buffer_factor=factor))
    rows = RANKS * max(1, -(-int(factor * T * K) // RANKS))
    block = (str(rows), str(D))
    assert [shape for _, shape in found] == [block, (str(rows),), block]
    assert {name for name, _ in found} == {"all_to_all_single"}


@pytest.mark.parametrize("tokens", ["equal", T])
def test_all_gather_holds_the_tokens_of_all_ranks(mesh, tokens):
    found = collectives(moepass.parallelize(model(), mesh, form="all_gather", tokens=tokens))
    rows = str(RANKS * T)
    gathered = [("all_gather_into_tensor", (rows, str(width))) for width in (D, K, K)]
    assert found == [*gathered, ("reduce_scatter_tensor", (str(T), str(D)))]


def test_replicated_sums_once(mesh):
    assert collectives(moepass.parallelize(model(), mesh, form="replicated")) == [("all_reduce", (str(T), str(D)))]


@pytest.mark.parametrize(("nodes", "local"), [(2, 2), (8, 8)])
def test_two_levels_send_counts_and_rows_twice(nodes, local, group):
    names = ("rest", "node", "local")
    grid = init_device_mesh("cpu", (RANKS // (nodes * local), nodes, local), mesh_dim_names=names)
    found = collectives(moepass.parallelize(model(), grid, ("node", "local")))
    assert sum(name == "all_to_all_single" for name, _ in found) == 6
    assert sum(name == "_local_scalar_dense" for name, _ in found) == 2 * (nodes - 1 + local)
