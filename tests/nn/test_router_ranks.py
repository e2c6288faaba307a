"""Two ranks that see different tokens move their correction biases by the counts of both."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moepass.nn import Router, post_batch
from moepass.nn.losses import expert_counts
from moepass.spec import RouterSpec

D, E, T = 4, 6, 15
SPEC = RouterSpec(top_k=2, score="sigmoid", bias=True, bias_update_rate=0.5)


def model_and_tokens(rank):
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleList(Router(D, E, SPEC) for _ in range(2))
    for router in model:
        router.reset_parameters(generator)
    return model, torch.randn(T, D, generator=torch.Generator().manual_seed(rank + 1)) + rank


def steps_of_a_rank(store, results, rank):
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    model, x = model_and_tokens(rank)
    for router in model:
        router(x)
    alone = dist.new_group([0])
    own = model[0].post_batch(dry_run=True, group=alone) if rank == 0 else None
    dry = post_batch(model, dry_run=True)
    steps = post_batch(model)
    torch.save((own, dry, steps, [r.bias for r in model]), f"{results}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_make_the_same_step_from_the_sum_of_their_counts(tmp_path):
    command = [sys.executable, "-P", __file__, str(tmp_path / "store"), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    loads = [[], []]
    for rank in range(2):
        model, x = model_and_tokens(rank)
        for layer, router in enumerate(model):
            loads[layer].append(expert_counts(router(x).index_TK, E)[0])
    per_rank = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    mean = 2 * T * 2 / E
    for layer, (first, second) in enumerate(loads):
        wanted = 0.5 * torch.sign(mean - (first + second).double()).float()
        for _, dry, steps, biases in per_rank:
            assert torch.equal(steps[str(layer)], wanted)
            assert torch.equal(dry[str(layer)], wanted)
            assert torch.equal(biases[layer], wanted)
    own = 0.5 * torch.sign(mean / 2 - loads[0][0].double()).float()
    assert torch.equal(per_rank[0][0], own), "a group of one counts for itself"
    assert not torch.equal(own, per_rank[0][2]["0"])


if __name__ == "__main__":
    steps_of_a_rank(sys.argv[1], sys.argv[2], int(sys.argv[3]))
