"""The backend behind DDP, FSDP2 and DTensor, in one process with gloo."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import moepass
from moepass.attach import ATTRIBUTE

D, WIDTH = 32, 64


class FFN(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, width), nn.Linear(width, D)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self, layers: int = 2, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FFN(width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (D,)))
        return x


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """One process, one rank."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def mesh():
    return init_device_mesh("cpu", (1,))


@pytest.fixture
def reports(monkeypatch):
    """Every report of a test, in order: DDP and graph breaks compile several graphs."""
    kept = []
    from moepass.explain import store

    monkeypatch.setattr(store, "record", kept.append)
    return kept


def sites(reports):
    return [site for report in reports for site in report.sites]


def compiled(model, inner="aot_eager", **options):
    return torch.compile(model, backend="moepass", options={"inner": inner, **options})


def assert_close(actual, expected, tolerance=5e-6):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def train_step(model, x):
    """Output and gradients by parameter name."""
    y = model(x)
    y.square().sum().backward()
    return y.detach(), [p.grad for p in model.parameters()]


def assert_same_step(model, reference, x):
    (y, grads), (y_ref, grads_ref) = train_step(model, x), train_step(reference, x)
    assert_close(y, y_ref)
    for ours, theirs in zip(grads, grads_ref, strict=True):
        ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- DDP -------------------------------------------------------------------------------------------------------------


#: DDP cuts buckets of 1 MiB and more: one layer of 1.2 MB makes a graph, and its inputs are fakes.
MANY_BUCKETS = {"width": 4800}, {"bucket_cap_mb": 1}
ONE_BUCKET = {"width": WIDTH}, {}


def ddp(model, buckets):
    return DistributedDataParallel(model, **buckets[1])


def test_dense_model_under_ddp_falls_back_and_says_so(reports):
    model, x = Net(), torch.randn(16, D)
    reference = copy.deepcopy(model)
    assert_same_step(compiled(ddp(model, ONE_BUCKET)), reference, x)
    assert not any(ATTRIBUTE in p.__dict__ for p in model.parameters())
    assert [(s.id, s.status, s.reason) for s in sites(reports)] == [
        ("layers.0", "fallback", "data_parallel"),
        ("layers.1", "fallback", "data_parallel"),
    ]
    assert "moepass.convert before wrapping" in sites(reports)[0].hint


def test_dense_model_cut_into_ddp_buckets_comes_with_fake_inputs_and_falls_back(reports):
    model, x = Net(**MANY_BUCKETS[0]), torch.randn(16, D)
    reference = copy.deepcopy(model)
    assert_same_step(compiled(ddp(model, MANY_BUCKETS)), reference, x)
    assert not any(ATTRIBUTE in p.__dict__ for p in model.parameters())
    found = sites(reports)
    assert len(reports) > 1, "the graph was not cut"
    assert found
    assert {(s.status, s.reason) for s in found} == {("fallback", "fake_inputs")}
    assert "moepass.convert before wrapping" in found[0].hint


@pytest.mark.parametrize("buckets", [ONE_BUCKET, MANY_BUCKETS], ids=["data_parallel", "fake_inputs"])
def test_strict_refuses_a_dense_model_under_ddp(buckets):
    with pytest.raises(Exception, match=r"data_parallel|fake_inputs"):
        compiled(ddp(Net(**buckets[0]), buckets), strict=True)(torch.randn(16, D))


@pytest.mark.parametrize(
    ("inner", "buckets"),
    [("aot_eager", ONE_BUCKET), ("aot_eager", MANY_BUCKETS), ("inductor", MANY_BUCKETS)],
    ids=["one_bucket", "many_buckets", "many_buckets_inductor"],
)
def test_converted_model_under_ddp_is_lowered_and_trains_as_without(reports, inner, buckets):
    model, x = Net(**buckets[0]), torch.randn(16, D)
    moepass.convert(model)
    reference = copy.deepcopy(model)
    assert_same_step(compiled(ddp(model, buckets), inner), reference, x)
    found = sites(reports)
    assert [(s.kind, s.status) for s in found] == [("moe", "lowered")] * 2
    assert sorted(s.id for s in found) == ["layers.0", "layers.1"]


# --- FSDP2 -----------------------------------------------------------------------------------------------------------


def shard(model, mesh, root=True):
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh) if root else model


@pytest.mark.parametrize("what", ["whole_model", "each_layer"])
def test_dense_ffn_under_fsdp2_is_skipped_as_sharded(reports, mesh, what):
    model, x = Net(), torch.randn(16, D)
    reference = copy.deepcopy(model)
    shard(model, mesh)
    if what == "whole_model":
        wrapped = compiled(model)
    else:
        wrapped = model
        for layer in model.layers:
            layer.compile(backend="moepass", options={"inner": "aot_eager"})
    assert_same_step(wrapped, reference, x)
    assert_same_step(wrapped, reference, x)
    found = sites(reports)
    assert found
    assert {(s.status, s.reason) for s in found} == {("skipped", "sharded_parameter")}


def test_root_only_fsdp2_is_seen_too(reports, mesh):
    model, x = Net(), torch.randn(16, D)
    reference = copy.deepcopy(model)
    assert_same_step(compiled(fully_shard(model, mesh=mesh)), reference, x)
    assert {(s.status, s.reason) for s in sites(reports)} == {("skipped", "sharded_parameter")}


def test_strict_refuses_a_dense_ffn_under_fsdp2(mesh):
    model = shard(Net(), mesh)
    with pytest.raises(Exception, match=r"sharded_parameter.*convert before sharding"):
        compiled(model, strict=True)(torch.randn(16, D))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_converted_model_under_fsdp2_is_lowered_and_trains_as_without(reports, mesh, inner):
    model, x = Net(), torch.randn(16, D)
    moepass.convert(model)
    reference = copy.deepcopy(model)
    shard(model, mesh)
    assert_same_step(compiled(model, inner), reference, x)
    assert {(s.kind, s.status) for s in sites(reports)} == {("moe", "lowered")}


def test_a_plain_model_beside_an_fsdp2_model_is_still_rewritten(reports, mesh):
    sharded, plain, x = shard(Net(), mesh), Net(), torch.randn(16, D)
    compiled(sharded)(x)
    reports.clear()
    torch._dynamo.reset()
    assert_close(compiled(plain)(x), plain(x))
    assert {s.status for s in sites(reports)} == {"lowered"}


# --- DTensor ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=["sharded", "replicated"])
def test_dtensor_weights_are_skipped(reports, mesh, placement):
    model, x = Net(1), torch.randn(16, D)
    for linear in (model.layers[0].up, model.layers[0].down):
        for name, p in list(linear.named_parameters()):
            setattr(linear, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))
    x = distribute_tensor(x, mesh, [Replicate()])
    expected = model.layers[0](x).full_tensor()
    assert torch.equal(compiled(model.layers[0])(x).full_tensor(), expected)
    assert [(s.status, s.reason) for s in sites(reports)] == [("skipped", "sharded_parameter")]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="sharded_parameter"):
        compiled(model.layers[0], strict=True)(x)
