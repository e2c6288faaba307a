"""What outlives a step, over real ranks: checkpoints, resharding, router state, and ranks that disagree.

One group of four processes does everything; P = 4, 2 and 1 are meshes of it.
"""

from __future__ import annotations

import re

import dense_zoo
import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import moepass
from moepass import errors
from moepass.nn import post_batch
from moepass.nn.metrics import over_ranks
from moepass.parallel import average_gradients, clip_grad_norm_, gather, load_checkpoint, save_checkpoint
from moepass.spec import ExpertSpec, LossSpec, MoESpec, RouterSpec

D, S = 8, 6
EXPERTS = ExpertSpec(num_experts=8, intermediate_size=8, activation="swiglu")
SPEC = MoESpec(experts=EXPERTS)
UPCYCLED = MoESpec(experts=ExpertSpec(num_experts=4))


class Net(nn.Module):
    def __init__(self, spec: MoESpec = SPEC, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.moe, self.recompute = nn.Linear(D, D), spec.build(D), recompute

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.inner(x)
        return h + (checkpoint(self.moe, h, use_reentrant=False) if self.recompute else self.moe(h))


def whole(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in state.items()}


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    found = [optimizer.state[p]["exp_avg"] for group in optimizer.param_groups for p in group["params"]]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).clone() for t in found]


def tokens(rank: int, count: int = S) -> Tensor:
    return torch.randn(S, D, generator=torch.Generator().manual_seed(rank))[:count]


def equal(a, b) -> bool:
    pairs = [(a[k], b[k]) for k in b] if isinstance(b, dict) else list(zip(a, b, strict=True))
    return all(torch.equal(x, y) for x, y in pairs)


# --- in the ranks ----------------------------------------------------------------------------------------------------


def resharding(rank: ranks.Rank, meshes) -> dict[str, bool]:
    """Trained at P=4, then 4 -> 2 -> 1 -> 4."""
    model = moepass.parallelize(Net(), meshes[4])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model(tokens(rank.number)).square().sum().backward()
    average_gradients(model, meshes[4])
    optimizer.step()
    first, first_moments, found = whole(model), moments(optimizer), {}
    save_checkpoint(model, rank.folder / "at4", optimizer, {"step": 1})
    for before, after in ((4, 2), (2, 1), (1, 4)):
        torch.manual_seed(1)
        mesh = meshes[after]
        other = moepass.parallelize(Net(), mesh)
        again = torch.optim.AdamW(other.parameters(), 1e-2)
        source = rank.folder / (f"at{before}" if before != 1 else "at1")
        extra = load_checkpoint(other, source, again)
        found[f"{before}->{after}"] = (
            equal(whole(other), first) and equal(moments(again), first_moments) and extra == {"step": 1}
        )
        if after != 4:
            save_checkpoint(other, rank.folder / f"at{after}", again, {"step": 1})
    if rank.number == 0:
        gather(rank.folder / "at4", rank.folder / "gathered")
        found["gathered"] = equal(load_file(rank.folder / "gathered" / "model.safetensors"), first)
    dist.barrier()
    return found


def composition(rank: ranks.Rank, meshes) -> dict[str, float]:
    """The gradients of two micro-batches with everything around the experts, against one rank with all tokens."""
    reference, found = Net(), {}
    for seed in range(8):
        reference(tokens(seed)).square().sum().div(4).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    wanted = [p.grad for p in reference.parameters()]
    for name in ("plain", "recompute", "ddp", "two_dimensions", "fsdp"):
        mesh = meshes["grid"] if name in ("two_dimensions", "fsdp") else meshes[4]
        model = moepass.parallelize(Net(recompute=name == "recompute"), mesh, fsdp="rest" if name == "fsdp" else None)
        run = DistributedDataParallel(model) if name == "ddp" else model
        for micro in range(2):
            run(tokens(2 * rank.number + micro)).square().sum().backward()
        if name != "ddp":
            average_gradients(model, mesh)  # after FSDP2 nothing is left to average, and nothing may change
        ours = clip_grad_norm_(model.parameters(), 0.5)
        got = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        worst = max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True))
        found[name] = max(worst, abs(float(ours - norm)) / float(norm))
    return found


def router_state(rank: ranks.Rank, meshes) -> dict[str, float | bool]:
    """Losses, biases and metrics of ranks with 6, 0, 3 and 5 tokens."""
    sizes, found = (6, 0, 3, 5), {}
    everything = torch.cat([tokens(r, n) for r, n in enumerate(sizes)])
    for convention in ("olmo_core_local", "hf", "automodel", "megatron"):
        losses = LossSpec(load_balance=convention, load_balance_weight=0.1, z_weight=0.01, scope="global")
        spec = MoESpec(experts=EXPERTS, losses=losses)
        reference, model = Net(spec), moepass.parallelize(Net(spec), meshes[4])
        own, alone = model.moe, reference.moe
        y, said = own(tokens(rank.number, sizes[rank.number]), return_losses=True)
        total = said["load_balance"] + said["z"]
        (total + 0.0 * y.sum()).backward()
        average_gradients(model, meshes[4])
        mean = total.detach().clone()
        dist.all_reduce(mean)
        _, wanted = alone(everything, return_losses=True)
        (wanted["load_balance"] + wanted["z"]).backward()
        value = float(mean / 4 - wanted["load_balance"] - wanted["z"])
        found[convention] = max(abs(value), float((own.router.weight.grad - alone.router.weight.grad).abs().max()))
    router = RouterSpec(score="sigmoid", bias=True, bias_update_rate=0.1)
    spec = MoESpec(router=router, experts=EXPERTS)
    reference, model = Net(spec), moepass.parallelize(Net(spec), meshes[4])
    model.moe.record_metrics(), reference.moe.record_metrics()
    model.moe(tokens(rank.number, sizes[rank.number])), reference.moe(everything)
    together, alone = over_ranks(model.moe.metrics()), reference.moe.metrics()
    pairs = zip(together, alone, strict=True)
    found["metrics"] = all(torch.allclose(a.double(), b.double(), atol=1e-6) for a, b in pairs)
    counts = reference.moe.router.tokens_per_expert
    post_batch(model)
    found["bias"] = torch.equal(model.moe.router.bias, reference.moe.router.move_bias(counts))
    return found


def disagreement(rank: ranks.Rank, meshes) -> list[str]:
    """What every rank hears when rank 2 differs."""
    odd = rank.number == 2
    spec = SPEC.model_copy(update={"router": RouterSpec(top_k=3 if odd else 2)})
    model = Net(spec).to(torch.bfloat16 if odd else torch.float32)
    heard = []
    for options in ({}, {"form": "all_gather" if odd else "all_to_all"}):
        try:
            moepass.parallelize(model, meshes[4], **options)
        except errors.RanksDiffer as error:
            heard.append(str(error))
    assert not isinstance(model.moe.w_in, DTensor), "nothing is changed"
    torch._dynamo.reset()
    model = moepass.parallelize(Net(), meshes[4])
    for options in ({"hardware": "H100" if odd else "cpu"}, {"plan": plan_file(rank, odd)}):
        try:
            torch.compile(model, backend="moepass", options=options | {"inner": "eager"}, fullgraph=True)(tokens(0))
        except Exception as error:  # Dynamo wraps what a backend raises
            heard.append(str(error))
    return heard


def plan_file(rank: ranks.Rank, odd: bool) -> str:
    """The plan of a model on one rank, for as many tokens as an odd rank or another has."""
    torch.compile(Net(), backend="moepass", options={"inner": "eager"})(tokens(0, S // (1 + odd)))
    path = rank.folder / f"plan{rank.number}.json"
    path.write_text(moepass.last_plan().to_json())
    torch._dynamo.reset()
    return str(path)


def upcycled(rank: ranks.Rank, meshes) -> dict[int, bool]:
    """A dense model made into shards on P ranks, trained and stored: at P = 4, 2 and 1."""
    found = {}
    for P in (4, 2, 1):
        dense = dense_zoo.build("llama", num_hidden_layers=1)
        if P > 1 and rank.number % 2:  # no mesh's first rank, whose values count
            dense.requires_grad_(False).lm_head.weight += 1.0
            dense.model.layers[0].mlp.up_proj.weight += 1.0
            dense.requires_grad_()
        model, _ = moepass.parallel.convert(dense, meshes[P], spec=UPCYCLED, init="copy+noise")
        alone = dense_zoo.build("llama", num_hidden_layers=1)
        moepass.convert(alone, UPCYCLED, init="copy+noise")
        found[P] = equal(whole(model), alone.state_dict())
        logits, wanted = dense_zoo.logits(model), dense_zoo.logits(alone)
        found[P] &= bool((logits - wanted).abs().max() <= 1e-5 * wanted.abs().max())
        save_checkpoint(model, rank.folder / f"llama{P}")
    if rank.number == 0:
        torch.save(alone.state_dict(), rank.folder / "llama.pt")
    return found


def main(rank: ranks.Rank) -> None:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rest", "ep"))
    meshes = {
        4: init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)), "grid": grid, 2: grid["ep"],
        1: init_device_mesh("cpu", (4, 1), mesh_dim_names=("rest", "ep"))["ep"],
    }  # fmt: skip
    parts = (resharding, composition, router_state, disagreement, upcycled)
    rank.save({part.__name__: part(rank, meshes) for part in parts})


# --- what they found -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def found(folder):
    return ranks.spawn(__file__, 4, folder)


@pytest.mark.parametrize("way", ["4->2", "2->1", "1->4"])
def test_weights_and_optimizer_reshard_bit_for_bit(found, way):
    assert all(rank["resharding"][way] for rank in found)


def test_a_gathered_checkpoint_is_the_model_bit_for_bit(found):
    assert found[0]["resharding"]["gathered"]


@pytest.mark.parametrize("P", [4, 2, 1])
def test_a_model_upcycled_into_shards_is_that_of_one_rank_and_gathers_to_a_stock_one(found, folder, P):
    assert all(rank["upcycled"][P] for rank in found)
    assert gather(folder / f"llama{P}", folder / f"mixtral{P}").form == "mixtral"
    stored, whole = load_file(folder / f"mixtral{P}" / "model.safetensors"), torch.load(folder / "llama.pt")
    for e, expert in enumerate(whole["model.layers.0.mlp.w_in"]):
        name = f"model.layers.0.block_sparse_moe.experts.{e}"
        assert torch.equal(torch.cat([stored[f"{name}.w1.weight"], stored[f"{name}.w3.weight"]]), expert)
    moe = dense_zoo.load(folder / f"mixtral{P}").state_dict()
    assert torch.equal(moe["model.layers.0.mlp.experts.down_proj"], whole["model.layers.0.mlp.w_out"])


@pytest.mark.parametrize("around", ["plain", "recompute", "ddp", "two_dimensions", "fsdp"])
def test_accumulated_and_clipped_gradients_are_those_of_one_rank(found, around):
    assert all(rank["composition"][around] < 1e-5 for rank in found)


@pytest.mark.parametrize("convention", ["olmo_core_local", "hf", "automodel", "megatron"])
def test_global_losses_and_their_gradients_are_those_of_one_rank_with_uneven_tokens(found, convention):
    assert all(rank["router_state"][convention] < 1e-6 for rank in found)


def test_metrics_and_biases_are_those_of_all_tokens(found):
    assert all(rank["router_state"]["metrics"] and rank["router_state"]["bias"] for rank in found)


def test_every_rank_is_told_which_rank_differs_in_what(found):
    for rank in found:
        model, form, hardware, plan = rank["disagreement"]
        assert "moe.spec.router.top_k is 2 on ranks 0, 1, 3 and 3 on rank 2" in model
        assert "moe.dtype is torch.float32 on ranks 0, 1, 3 and torch.bfloat16 on rank 2" in model
        assert "moe.form is all_to_all on ranks 0, 1, 3 and all_gather on rank 2" in form
        assert "H100 on rank 2" in hardware
        assert re.search(r"plan is (\w+) on ranks 0, 1, 3 and (?!\1)\w+ on rank 2", plan), plan


if __name__ == "__main__":
    ranks.join(main)
