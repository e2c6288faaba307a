"""Warm compile caches under expert parallelism: a rank never gets the graph that another rank compiled."""

from __future__ import annotations

import os

import pytest
import ranks
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

import moepass
from moepass.spec import ExpertSpec, MoESpec, RouterSpec

#: What a rank computes in these depends on its number.
FORMS = ("replicated", "all_gather")
D = 16


def build(form: str) -> nn.Module:
    torch.manual_seed(0)
    spec = MoESpec(
        router=RouterSpec(top_k=2), experts=ExpertSpec(num_experts=4, intermediate_size=8, activation="swiglu")
    )
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    return moepass.parallelize(nn.Sequential(spec.build(D)), mesh, form=form, tokens="equal").eval()


def rank_main(rank: ranks.Rank) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(rank.folder / "caches")  # one folder for all ranks, as on one node
    found = {}
    for form in FORMS:
        x = torch.randn(24, D, generator=torch.Generator().manual_seed(0 if form == "replicated" else rank.number))
        for turn in ("cold", "warm"):
            torch.compiler.reset()
            torch.distributed.barrier()
            counters.clear()
            model = build(form)
            with torch.no_grad():
                expected = model(x)
                y = torch.compile(model, backend="moepass", fullgraph=True, options={"strict": True})(x)
            hits = counters["aot_autograd"]["autograd_cache_hit"]
            found[f"{form}, {turn}"] = (hits, float((y - expected).abs().max()))
    rank.save(found)


@pytest.mark.parametrize("form", FORMS)
def test_a_warm_cache_gives_each_rank_its_own_experts(form, launched):
    for rank, found in enumerate(launched):
        assert found[f"{form}, cold"][0] == 0
        hits, error = found[f"{form}, warm"]
        assert hits >= 1, f"rank {rank}: the second compile did not come from the cache"
        assert error < 1e-5, f"rank {rank}"


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return ranks.spawn(__file__, 2, tmp_path_factory.mktemp("caches"))


if __name__ == "__main__":
    ranks.join(rank_main)
