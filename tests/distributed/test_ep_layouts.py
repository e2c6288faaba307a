"""Layouts of ranks and ways to run: two levels compiled, tensor parallelism, chunks, shared experts over the dispatch.

Every case is held against one rank that has all tokens and all experts, in float64; four processes serve them all.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import moepass
from moepass.parallel import average_gradients, clip_grad_norm_, gather, load_checkpoint, save_checkpoint
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec

S, E, K, D, F = 6, 8, 2, 8, 12
TOLERANCE = 1e-12
SHAPES = {"ep": (4,), "node,local": (2, 2), "ep,tp": (2, 2), "dp,tp": (2, 2), "dp,one,tp": (1, 1, 4)}


class Case(NamedTuple):
    """``mesh`` names the dimensions, ``ep`` those that hold experts."""

    mesh: str
    ep: str | None
    form: str = "auto"
    factor: float | None = None
    chunks: int = 1
    capacity: float | None = None
    run: str = "eager"

    @property
    def name(self) -> str:
        """What pytest shows."""
        return "-".join(map(str, self))


def cases() -> list[Case]:
    forms = [("all_to_all", None), ("all_to_all", 4.0), ("all_gather", None), ("replicated", None)]
    sliced = [Case("ep,tp", "ep", *form, capacity=cf) for form, cf in itertools.product(forms, (None, 0.8))]
    alone = [Case("dp,tp", None, "local"), Case("dp,one,tp", None, capacity=0.8), Case("dp,one,tp", "one", *forms[0])]
    cut = [Case("ep", "ep", *form, chunks=n) for form, n in zip(forms, (2, 3, 4, 2), strict=True)]
    cut += [Case("node,local", "node,local", "hierarchical", chunks=2), Case("ep,tp", "ep", *forms[0], chunks=3)]
    compiled = [
        Case("node,local", "node,local", "hierarchical", run="aot_eager"),
        Case("ep,tp", "ep", *forms[0], chunks=2, run="aot_eager"),
        Case("dp,tp", None, "local", run="aot_eager"),
    ]
    return [*sliced, *alone, *cut, *compiled]


class Net(nn.Module):
    """Something replicated in front of the experts, so that gradients have to pass through them."""

    def __init__(self, capacity: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(D, D)
        self.moe = MoESpec(
            router=RouterSpec(top_k=K),
            experts=ExpertSpec(num_experts=E, intermediate_size=F, activation="swiglu", bias_in=True, bias_out=True,
                               shared_intermediate_size=10, shared_combine="gated"),
            dispatch=DispatchSpec(capacity_factor=capacity),
        ).build(D)  # fmt: skip
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.inner(x)
        return h + self.moe(h)


def whole(tensor: Tensor, like: Tensor) -> Tensor:
    """A gradient or weight of all ranks, in the layout of one."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.reshape(like.shape)


def holder(case: Case, mesh: DeviceMesh) -> tuple[int, int]:
    """Which of how many batches a rank holds: ranks of tp, and of ``replicated``, hold the same."""
    same = ("tp", *(("ep",) if case.form == "replicated" else ()))
    number, count = 0, 1
    for d, name in enumerate(mesh.mesh_dim_names):
        if name not in same:
            number, count = number * mesh.size(d) + mesh.get_coordinate()[d], count * mesh.size(d)
    return number, count


def batches(case: Case, count: int) -> list[Tensor]:
    x = torch.randn(count, S, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    even = case.factor is not None or case.run != "eager"
    return [x[i, : S if even or count == 1 else (S, 0, 3, 5)[i]] for i in range(count)]


def loss(y: Tensor, scale: float) -> Tensor:
    return (torch.linspace(-1, 1, D, dtype=torch.float64) * y.square()).sum() * scale


def error(case: Case, mesh: DeviceMesh) -> float:
    """The largest difference of outputs, gradients and their norm."""
    torch._dynamo.reset()
    reference, model = Net(case.capacity), Net(case.capacity)
    ep = None if case.ep is None else tuple(case.ep.split(","))
    tp = "tp" if "tp" in case.mesh else None
    moepass.parallelize(model, mesh, ep, tp=tp, form=case.form, buffer_factor=case.factor, chunks=case.chunks)
    run: Any = model
    if case.run != "eager":
        run = torch.compile(model, backend="moepass", fullgraph=True, options={"inner": case.run, "strict": True})
    number, count = holder(case, mesh)
    each = batches(case, count)
    total, start = sum(map(len, each)), sum(map(len, each[:number]))
    y = run(each[number])
    loss(y, count / total).backward()
    average_gradients(model, mesh)
    wanted = reference(torch.cat(each))
    loss(wanted, 1 / total).backward()
    norms = clip_grad_norm_(model.parameters(), 0.1), nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    pairs = [(y, wanted[start : start + len(y)]), norms]
    pairs += [(whole(p.grad, q), q.grad) for p, q in zip(model.parameters(), reference.parameters(), strict=True)]
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def state(rank: ranks.Rank, meshes: dict[str, DeviceMesh]) -> dict[str, bool]:
    """A sharded model's checkpoint: gathered, and read by other layouts."""
    model, found = moepass.parallelize(Net(), meshes["ep,tp"], tp="tp"), {}
    first = {name: value.detach() for name, value in Net().state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model(batches(Case("ep,tp", "ep"), 2)[rank.number // 2]).square().sum().backward()
    average_gradients(model, meshes["ep,tp"])
    save_checkpoint(model, rank.folder / "before")
    optimizer.step()
    save_checkpoint(model, rank.folder / "after", optimizer)
    if rank.number == 0:
        for name in ("before", "after"):
            gather(rank.folder / name, rank.folder / f"{name}-one")
        gathered = load_file(rank.folder / "before-one" / "model.safetensors")
        found["gathered"] = gathered.keys() == first.keys() and all(torch.equal(gathered[n], first[n]) for n in first)
    dist.barrier()
    last = load_file(rank.folder / "after-one" / "model.safetensors")
    for name, tp in (("ep", None), ("ep,tp", "tp")):
        other = moepass.parallelize(Net(), meshes[name], tp=tp)
        again = torch.optim.AdamW(other.parameters(), 1e-2)
        load_checkpoint(other, rank.folder / "after", again)
        names = dict(other.named_parameters())
        found[f"read by {name}"] = all(torch.equal(whole(names[n], last[n]), last[n]) for n in names)
        ours, theirs = (o.state[m.moe.w_in]["exp_avg"] for o, m in ((optimizer, model), (again, other)))
        found[f"moments read by {name}"] = torch.equal(whole(ours, last["moe.w_in"]), whole(theirs, last["moe.w_in"]))
    found["placements"] = [model.moe.w_in.placements, model.moe.w_out.placements, model.moe.b_out.placements] == [
        (Shard(0), Shard(2)), (Shard(0), Shard(2)), (Shard(0), Replicate())
    ]  # fmt: skip
    return found


def every_case(rank: ranks.Rank) -> None:
    meshes = {names: init_device_mesh("cpu", shape, mesh_dim_names=tuple(names.split(",")))
              for names, shape in SHAPES.items()}  # fmt: skip
    found = {case.name: error(case, meshes[case.mesh]) for case in cases()}
    hints = [site.hint for site in moepass.last_plan().sites]
    own = moepass.parallelize(Net(), meshes["ep"]).moe.parallel.groups[0]
    rank.save((found, state(rank, meshes), hints, own != dist.group.WORLD.group_name))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every rank found."""
    return ranks.spawn(__file__, 4, tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_layouts_compute_what_one_rank_does(found, case):
    for errors, *_ in found:
        assert errors[case.name] < TOLERANCE


def test_state_of_sliced_experts_is_bit_equal_in_every_layout(found):
    for _, state, *_ in found:
        assert all(state.values()), state
    assert "gathered" in found[0][1]


def test_the_plan_names_slices_and_shared_experts(found):
    for _, _, hints, _ in found:
        assert hints == [
            "local, beside a shared expert of width 10; F is this rank's part of 2 ranks' (tensor parallel)"
        ]


def test_experts_have_a_group_of_their_own(found):
    assert all(own for *_, own in found)


if __name__ == "__main__":
    ranks.join(every_case)
