"""Experts from several parents: whose weights lie where in DST, what is averaged, and what the report promises."""

from __future__ import annotations

import json

import pytest
import torch
from dense_zoo import error, load, logits, saved
from safetensors.torch import load_file

from moepass.upcycle.command import upcycle_checkpoint
from moepass.upcycle.hf.parents import mean, parent_of

PAIRS = [("llama", "mixtral"), ("qwen3", "qwen3_moe")]


def written(folder):
    return load_file(folder / "model.safetensors")


def experts_of(model, layer):
    """Gate, up and down ``[E, ...]`` of a loaded MoE."""
    experts = model.model.layers[layer].mlp.experts
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    return {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj.detach()}


@pytest.mark.parametrize(("family", "host"), PAIRS)
@pytest.mark.parametrize("others", ["average", "base"])
def test_experts_are_the_parents_blocks_and_the_rest_follows_the_rule(family, host, others, fine_tune, tmp_path):
    src = saved(family)
    folders = [src, fine_tune(src, "math"), fine_tune(src, "code")]
    report = upcycle_checkpoint(src, tmp_path / "dst", to=host, experts_from=folders, others=others)
    parents = [written(folder) for folder in folders]
    model = load(tmp_path / "dst")
    for layer in range(2):
        for matrix, stacked in experts_of(model, layer).items():
            assert len(stacked) == 3
            for e, parent in enumerate(parents):
                assert torch.equal(stacked[e], parent[f"model.layers.{layer}.mlp.{matrix}.weight"])
    made = model.state_dict()
    outside = [name for name in parents[0] if ".mlp." not in name]
    assert len(outside) > 10
    for name in outside:
        expected = torch.stack([p[name].double() for p in parents]).mean(0).float() if others == "average" else None
        assert torch.equal(made[name], parents[0][name] if expected is None else expected), name
    assert not report.exact
    assert "not SRC's function" in str(report)
    assert "identical experts" not in str(report)


def test_average_is_the_default_and_may_be_verified_without_a_promise(fine_tune, tmp_path):
    src = saved("llama")
    folders = [fine_tune(src, "math"), fine_tune(src, "code")]
    default = upcycle_checkpoint(src, tmp_path / "a", experts_from=folders, verify=True)
    upcycle_checkpoint(src, tmp_path / "b", experts_from=folders, others="average")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert not default.verified.passed
    assert not default.broken


@pytest.mark.parametrize(("family", "host"), PAIRS)
@pytest.mark.parametrize("options", [{"others": "base"}, {"init": "virtual-groups"}, {"router": "prompts"}], ids=str)
def test_equal_parents_give_the_dense_function_and_the_bytes_of_the_recipe_on_src(
    family, host, options, fine_tune, tmp_path
):
    src = saved(family)
    folders = [fine_tune(src, "a", ()), src, fine_tune(src, "b", ())]
    if "router" in options:
        options = options | {"prompts": [[[i, i + 1]] for i in (3, 13, 23)]}
    report = upcycle_checkpoint(src, tmp_path / "dst", to=host, experts_from=folders, **options)
    assert report.exact
    assert error(src, tmp_path / "dst") <= 5e-6
    alone = {k: v for k, v in options.items() if k != "others"}
    upcycle_checkpoint(src, tmp_path / "alone", to=host, experts=report.content["recipe"]["experts"], **alone)
    names = [p.name for p in (tmp_path / "alone").glob("*.safetensors")]
    assert all((tmp_path / "dst" / n).read_bytes() == (tmp_path / "alone" / n).read_bytes() for n in names)


@pytest.mark.parametrize("parts", [("mlp.up_proj",), ("self_attn.q_proj",), ("norm",)])
def test_exact_needs_every_byte_that_enters(parts, fine_tune, tmp_path):
    src = saved("qwen3")
    folders = [src, fine_tune(src, "tuned", parts)]
    kept = upcycle_checkpoint(src, tmp_path / "kept", experts_from=folders, others="base")
    assert kept.exact == ("mlp.up_proj" not in parts)
    assert (error(src, tmp_path / "kept") <= 5e-6) == kept.exact
    assert not upcycle_checkpoint(src, tmp_path / "mean", experts_from=folders, dry_run=True).exact


def test_parents_that_equal_each_other_but_not_src_are_not_exact(fine_tune, tmp_path):
    src = saved("llama")
    tuned = fine_tune(src, "tuned")
    report = upcycle_checkpoint(src, tmp_path / "dst", experts_from=[tuned, tuned])
    assert not report.exact
    assert error(tuned, tmp_path / "dst") <= 5e-6, "it is the parent's function"


def test_more_experts_than_parents_stand_together(fine_tune, tmp_path):
    src = saved("llama")
    folders = [src, fine_tune(src, "math")]
    report = upcycle_checkpoint(src, tmp_path / "dst", experts_from=folders, experts=4)
    up, parents = experts_of(load(tmp_path / "dst"), 1)["up_proj"], [written(f) for f in folders]
    for e in range(4):
        assert torch.equal(up[e], parents[e // 2]["model.layers.1.mlp.up_proj.weight"])
    assert report.content["parents"]["expert"] == [0, 0, 1, 1]


def test_a_virtual_group_is_one_block_of_one_parent(fine_tune, tmp_path):
    src = saved("qwen3")
    folders = [src, fine_tune(src, "math"), fine_tune(src, "code")]
    report = upcycle_checkpoint(src, tmp_path / "dst", experts_from=folders, init="virtual-groups")
    made = experts_of(load(tmp_path / "dst"), 0)
    assert report.content["recipe"]["experts"] == len(made["up_proj"]) == 6
    for k, folder in enumerate(folders):
        dense = written(folder)
        pair = [made["down_proj"][2 * k], made["down_proj"][2 * k + 1]]
        assert torch.equal(torch.cat(pair, 1), dense["model.layers.0.mlp.down_proj.weight"] * 2)
        gate = torch.cat([made["gate_proj"][2 * k], made["gate_proj"][2 * k + 1]])
        assert torch.equal(gate, dense["model.layers.0.mlp.gate_proj.weight"])


def test_each_experts_noise_is_relative_to_its_own_parent(fine_tune, tmp_path):
    src = saved("qwen3")
    folders = [src, fine_tune(src, "math")]
    upcycle_checkpoint(src, tmp_path / "dst", experts_from=folders, init="noise", noise_std=0.1, others="base")
    for k, folder in enumerate(folders):
        upcycle_checkpoint(folder, tmp_path / str(k), experts=2, init="noise", noise_std=0.1)
        own = written(tmp_path / str(k))
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.1.mlp.experts.{k}.{matrix}.weight"
            assert torch.equal(written(tmp_path / "dst")[name], own[name])


def test_parts_of_fused_matrices_are_averaged_and_kept_apart(fine_tune, tmp_path):
    src = saved("phi3")
    folders = [fine_tune(src, "math"), fine_tune(src, "code")]
    upcycle_checkpoint(src, tmp_path / "dst", experts_from=folders)
    model, parents = load(tmp_path / "dst"), [written(f) for f in folders]
    for e, parent in enumerate(parents):
        experts = model.model.layers[1].mlp.experts
        assert torch.equal(experts.gate_up_proj[e], parent["model.layers.1.mlp.gate_up_proj.weight"])
        assert torch.equal(experts.down_proj[e], parent["model.layers.1.mlp.down_proj.weight"])
    qkv = [p["model.layers.0.self_attn.qkv_proj.weight"].double() for p in parents]
    q = torch.stack(qkv).mean(0).float()[:32]
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, q)


@pytest.mark.parametrize("init", ["copy", "virtual-groups", "noise"])
def test_a_host_that_stacks_experts_gets_the_same_ones(init, fine_tune, tmp_path):
    """granitemoe holds all experts in one tensor, mixtral each in its own."""
    src = saved("llama")
    folders = [src, fine_tune(src, "math")]
    for host in ("granitemoe", "mixtral"):
        upcycle_checkpoint(src, tmp_path / host, to=host, experts_from=folders, init=init)
    stacked, own = written(tmp_path / "granitemoe"), written(tmp_path / "mixtral")
    prefix = "model.layers.1.block_sparse_moe."
    for e in range(2):
        gate, up, down = (own[f"{prefix}experts.{e}.{w}.weight"] for w in ("w1", "w3", "w2"))
        assert torch.equal(stacked[f"{prefix}input_linear.weight"][e], torch.cat([gate, up]))
        assert torch.equal(stacked[f"{prefix}output_linear.weight"][e], down)
    load(tmp_path / "granitemoe")


def test_layers_that_stay_dense_are_averaged_too(fine_tune, tmp_path):
    src = saved("qwen3")
    folders = [src, fine_tune(src, "math")]
    upcycle_checkpoint(src, tmp_path / "dst", experts_from=folders, layers="*.1.mlp")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = sum(written(f)[name].double() for f in folders) / 2
    assert torch.equal(written(tmp_path / "dst")[name], expected.float())
    assert torch.isfinite(logits(load(tmp_path / "dst"))).all()


def test_the_report_names_each_experts_parent_and_parents_are_left_alone(half, fine_tune, tmp_path):
    folders = [half, fine_tune(half, "math")]
    before = {p: p.read_bytes() for f in folders for p in f.iterdir()}
    upcycle_checkpoint(half, tmp_path / "dst", experts_from=folders)
    report = json.loads((tmp_path / "dst" / "moepass_upcycle.json").read_text())
    assert [p["path"] for p in report["parents"]["of"]] == [str(f) for f in folders]
    assert len({p["fingerprint"] for p in report["parents"]["of"]}) == 2, "values count: configs and shapes are equal"
    expert = report["tensors"]["model.layers.0.mlp.experts.1.up_proj.weight"]
    assert expert == {"from": ["parent.1/model.layers.0.mlp.up_proj.weight"], "how": "copied"}
    assert len(report["tensors"]["model.norm.weight"]["from"]) == 2
    assert "experts from half, math; other weights: their mean" in (
        tmp_path / "dst" / "README.md").read_text().lower()  # fmt: skip
    assert {p: p.read_bytes() for f in folders for p in f.iterdir()} == before


def test_a_parent_in_another_dtype_is_cast_and_named(half, tmp_path):
    report = upcycle_checkpoint(half, tmp_path / "dst", experts_from=[half, saved("qwen3")])
    assert any("holds F32: cast to SRC's BF16" in w for w in report.warnings)
    assert {t.dtype for t in written(tmp_path / "dst").values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_mean_is_rounded_once_and_leaves_its_inputs(dtype, n):
    from fractions import Fraction

    draw = torch.Generator().manual_seed(n)
    tensors = [torch.randn(5, 41, generator=draw).to(dtype) for _ in range(n)]
    before = [x.clone() for x in tensors]
    made = mean(tensors, dtype)
    assert made.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    for values, result in zip(zip(*(x.flatten().tolist() for x in tensors), strict=True), made.flatten(), strict=True):
        exact = sum(map(Fraction, values)) / n
        up, down = (torch.nextafter(result, torch.tensor(s, dtype=dtype)).item() for s in (float("inf"), -float("inf")))
        nearest = abs(Fraction(result.item()) - exact)
        slack = 0 if dtype != torch.float64 else Fraction(1, 10**15)  # a float64 sum rounds on the way
        assert nearest <= min(abs(Fraction(up) - exact), abs(Fraction(down) - exact)) + slack


def test_a_mean_next_to_a_tie_is_not_rounded_twice():
    values = [1.0 + 2**-7, 1.0, 1.0 + 2**-7, 1.0 + 2**-7 - 2**-7 + 2**-30]  # mean: 1 + 2**-8 (a tie) + 2**-32
    tensors = [torch.tensor([v], dtype=torch.float64) for v in values]
    assert mean(tensors, torch.bfloat16).item() == 1.0 + 2**-7
    assert mean([-x for x in tensors], torch.bfloat16).item() == -1.0 - 2**-7


def test_experts_of_one_parent_are_neighbours():
    assert [parent_of(e, 6, 1, 3) for e in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [parent_of(e, 8, 2, 2) for e in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [parent_of(e, 6, 2, 3) for e in range(6)] == [0, 0, 1, 1, 2, 2]
