"""``moepass.parallel.convert``: a dense model straight into shards, without all experts on any rank."""

from __future__ import annotations

import weakref

import dense_zoo
import pytest
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moepass
from moepass import errors
from moepass.parallel import convert
from moepass.spec import ExpertSpec, InitSpec, MoESpec

RANK, RANKS, E = 2, 4, 8
SPEC = MoESpec(experts=ExpertSpec(num_experts=E))


@pytest.fixture(scope="module")
def folders():
    """Dense checkpoints; in a group, transformers would write them on the first rank alone."""
    kinds = {"tied": ("llama", {"tie_word_embeddings": True}), "own_head": ("qwen3", {}),
             "wide": ("llama", {"intermediate_size": 512})}  # fmt: skip
    return {name: dense_zoo.saved(family, **config) for name, (family, config) in kinds.items()}


@pytest.fixture(scope="module")
def mesh(folders):
    """This process is rank 2 of four that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,), mesh_dim_names=("ep",))
    dist.destroy_process_group()


class Held(TorchDispatchMode):
    """Bytes of the storages that ops made and that live, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add((leaf._local_tensor if isinstance(leaf, DTensor) else leaf).untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or storage.device.type == "meta":
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def assert_own_rows(sharded: nn.Module, whole: nn.Module) -> None:
    """Every tensor of the whole model, this rank's part of those that are sharded; nothing else, nothing on meta."""
    ours, theirs = sharded.state_dict(), whole.state_dict()
    assert list(ours) == list(theirs)
    cut = 0
    for name, tensor in ours.items():
        wanted = theirs[name]
        if isinstance(tensor, DTensor):
            cut += 1
            assert tensor.shape == wanted.shape
            wanted, tensor = wanted.chunk(RANKS)[RANK], tensor.to_local()
        assert torch.equal(tensor, wanted), name
        assert tensor.dtype == wanted.dtype
    assert cut >= 2
    assert all(
        p.requires_grad == q.requires_grad for p, q in zip(sharded.parameters(), whole.parameters(), strict=True)
    )


@pytest.mark.parametrize("method", ["virtual_groups", "copy+noise", "drop", "split"])
def test_a_loaded_model_becomes_the_shards_of_what_convert_makes(method, mesh):
    torch.manual_seed(0)
    dense = nn.Sequential(tiny.Net(), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)))
    spec = SPEC if method != "split" else MoESpec(router=moepass.RouterSpec(top_k=E), experts=SPEC.experts)
    init = InitSpec(method=method, seed=5)
    sharded, report = convert(dense, mesh, spec=spec, init=init)
    assert len(report.converted) == 3
    assert not any(isinstance(m, moepass.nn.MoE) for m in dense.modules()), "the dense model stays as it is"
    moepass.convert(dense, spec, init=init)
    assert_own_rows(sharded, dense)


@pytest.mark.parametrize("kind", ["tied", "own_head"])
def test_a_folder_becomes_the_shards_of_what_convert_makes(kind, folders, mesh):
    folder = folders[kind]
    sharded, _ = convert(folder, mesh, spec=SPEC, init="copy+noise", seed=3)
    whole = dense_zoo.load(folder)
    moepass.convert(whole, SPEC, init="copy+noise", seed=3)
    assert_own_rows(sharded, whole)
    assert (sharded.lm_head.weight is sharded.model.embed_tokens.weight) == (kind == "tied")


@pytest.mark.parametrize("source", ["loaded", "folder"])
def test_no_rank_ever_holds_all_experts(source, folders, mesh):
    folder = folders["wide"]
    given = dense_zoo.load(folder) if source == "loaded" else folder
    spec = MoESpec(experts=ExpertSpec(num_experts=2 * E))
    with Held() as held:
        sharded, _ = convert(given, mesh, spec=spec, init="copy+noise")
    experts = sum(p.nbytes for n, p in sharded.named_parameters() if isinstance(p, DTensor))
    own = sum(p.to_local().nbytes for n, p in sharded.named_parameters() if isinstance(p, DTensor))
    assert own == experts // RANKS
    with Held() as alone:
        moepass.convert(dense_zoo.load(folder), spec, init="copy+noise")
    assert alone.peak > experts, "the measure sees experts that are whole"
    rest = sum(p.nbytes for p in sharded.parameters() if not isinstance(p, DTensor))
    block = experts // (2 * E) // 2  # dense, of one of two layers; a few such are in the works
    assert own < held.peak < own + rest + 7 * block < experts // 2


def test_nothing_is_changed_where_something_is_refused(mesh):
    dense = tiny.Net()
    names = list(dense.state_dict())
    ten = MoESpec(experts=ExpertSpec(num_experts=10))
    with pytest.raises(errors.NotDivisible, match=r"num_experts=10 .*=4"):
        convert(dense, mesh, spec=ten, init="copy")
    with pytest.raises(errors.BadMesh, match="no dimension 'tp'"):
        convert(dense, mesh, "tp")
    with pytest.raises(errors.BadOption, match="option 'fsdp'"):
        convert(dense, mesh, fsdp="ep")
    with torch.device("meta"):
        nowhere = tiny.Net()
    with pytest.raises(errors.BadMesh, match="is on meta"):
        convert(nowhere, mesh)
    assert list(dense.state_dict()) == names
