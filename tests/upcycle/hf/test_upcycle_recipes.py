"""What the experts on disk are: equal to those of ``moepass.convert``, keyed by seed and name, tied where promised."""

from __future__ import annotations

import pytest
import torch
from dense_zoo import build, save, saved
from safetensors.torch import load_file
from scipy.stats import kstest

import moepass
from moepass.spec import ExpertSpec, InitSpec, MoESpec, RouterSpec
from moepass.upcycle import one_expert
from moepass.upcycle.command import upcycle_checkpoint
from moepass.upcycle.hf.hosts import HOSTS
from moepass.upcycle.hf.recipe import Recipe, plan
from moepass.upcycle.init import MoEWeights
from moepass.upcycle.one_expert import moments

METHODS = [
    ("copy", "copy", {}),
    ("virtual-groups", "virtual_groups", {"granularity": 2}),
    ("virtual-groups", "virtual_groups", {"granularity": 1}),
    ("noise", "copy+noise", {"noise_std": 0.1}),
    ("drop", "drop", {"drop_ratio": 0.25}),
    ("drop", "drop", {"drop_ratio": 0.25, "drop_indices": "independent"}),
    ("split", "split", {}),
    ("cluster", "cluster", {}),
]


def written(folder):
    return load_file(folder / "model.safetensors")


def disk_experts(tensors, layer, E, stacked=False):
    prefix = f"model.layers.{layer}."
    if stacked:
        made = (
            tensors[f"{prefix}block_sparse_moe.{n}.weight"] for n in ("router.layer", "input_linear", "output_linear")
        )
        return MoEWeights(*made)

    def stack(name):
        return torch.stack([tensors[f"{prefix}mlp.experts.{e}.{name}.weight"] for e in range(E)])

    w_in = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
    return MoEWeights(tensors[f"{prefix}mlp.gate.weight"], w_in, stack("down_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ours", "theirs", "options"), METHODS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize(("family", "stacked"), [("qwen3", False), ("granite", True)])
def test_the_command_and_convert_make_the_same_experts(family, stacked, ours, theirs, options, dtype, tmp_path):
    model = build(family, dtype=dtype)
    model.save_pretrained(tmp_path / "src")
    upcycle_checkpoint(tmp_path / "src", tmp_path / "dst", init=ours, experts=4, seed=7, **options)
    spec = MoESpec(router=RouterSpec(top_k=2), experts=ExpertSpec(num_experts=4))
    report = moepass.convert(model, spec, init=InitSpec(method=theirs, seed=7, **options))
    assert len(report.converted) == 2
    tensors = written(tmp_path / "dst")
    for layer, moe in enumerate(m for m in model.modules() if isinstance(m, moepass.nn.MoE)):
        made = disk_experts(tensors, layer, 4, stacked)
        assert torch.equal(made.router_weight, moe.router.weight)
        assert torch.equal(made.w_in, moe.w_in)
        assert torch.equal(made.w_out, moe.w_out)


def test_fused_matrices_are_cut_where_the_dense_model_cuts_them(tmp_path):
    src = saved("phi3", tie_word_embeddings=True)
    upcycle_checkpoint(src, tmp_path / "dst", experts=4)
    dense, made = written(src), written(tmp_path / "dst")
    gate, up = dense["model.layers.0.mlp.gate_up_proj.weight"].chunk(2)
    q, k, v = dense["model.layers.0.self_attn.qkv_proj.weight"].split([32, 16, 16])
    for e in range(4):
        assert torch.equal(made[f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight"], gate)
        assert torch.equal(made[f"model.layers.0.block_sparse_moe.experts.{e}.w3.weight"], up)
    for name, part in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(made[f"model.layers.0.self_attn.{name}_proj.weight"], part)


@pytest.mark.parametrize("router", ["orthogonal", "normal", "uniform"])
def test_routers_are_tied_within_groups_and_as_sharp_as_asked(router, tmp_path):
    src = saved("qwen3")
    options = {"init": "virtual-groups", "granularity": 2, "experts": 16, "top_k": 4, "router": router}
    upcycle_checkpoint(src, tmp_path / "dst", router_std=0.2, **options)
    gate = written(tmp_path / "dst")["model.layers.0.mlp.gate.weight"]
    assert torch.equal(gate[0::2], gate[1::2])
    assert torch.unique(gate[0::2], dim=0).shape[0] == 8
    torch.testing.assert_close(gate.norm(dim=1).mean(), torch.tensor(0.2), rtol=0.2, atol=0)


def test_virtual_groups_say_how_to_train_without_a_bump():
    def hint(method="virtual-groups", **options):
        warnings = plan(Recipe(method=method, **options), HOSTS["qwen3_moe"], 64).warnings
        return next((w for w in warnings if "take groups apart" in w), "")

    assert "router_std=3 (as exact)" in hint()
    assert "at most 0.1 / hidden_size" in hint()
    assert "router_std" not in hint(router_std=4.5)
    assert "at most 0.15 / hidden_size" in hint(router_std=4.5)
    assert "router_std" not in hint(renormalize=False), "a sharp router without normalised weights is not exact"
    assert hint(granularity=1) == hint("copy") == ""


def test_a_split_over_all_experts_starts_from_a_zero_router(tmp_path):
    upcycle_checkpoint(saved("qwen3"), tmp_path / "dst", init="split", experts=4, top_k=4)
    assert not written(tmp_path / "dst")["model.layers.0.mlp.gate.weight"].any()


@pytest.mark.parametrize("init", ["copy", "noise", "drop", "cluster"])
def test_seed_and_nothing_else_decides_the_bytes(init, tmp_path):
    src = saved("qwen3")
    for name, seed, threads in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        upcycle_checkpoint(src, tmp_path / name, init=init, experts=4, seed=seed)
        torch.set_num_threads(before)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_layers_draw_for_themselves(tmp_path):
    src = save(tmp_path / "src", "qwen3")
    upcycle_checkpoint(src, tmp_path / "all", init="noise", experts=4)
    upcycle_checkpoint(src, tmp_path / "one", init="noise", experts=4, layers="*.1.mlp")
    for name, tensor in written(tmp_path / "one").items():
        if "layers.1." in name:
            assert torch.equal(tensor, written(tmp_path / "all")[name]), name


def test_noise_is_normal_and_differs_between_experts_and_projections():
    dense, init = [torch.zeros(256, 512)] * 2, InitSpec(method="copy+noise", noise_std=0.5)
    draws = [
        one_expert.expert_in(dense, p, e, 1, init, "block", std=2.0).reshape(-1) for p in range(2) for e in range(2)
    ]
    for draw in draws:
        assert kstest(draw.numpy(), "norm").pvalue > 1e-4  # std = noise_std * 2
    assert torch.corrcoef(torch.stack(draws)).sub_(torch.eye(4)).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_working_in_pieces_changes_no_bit(dtype, monkeypatch):
    weight = torch.randn(48, 32).to(dtype)
    channels = torch.arange(2, 26)

    def run():
        dropped = (f(weight, channels, 0, "key") for f in (one_expert._with_rows, one_expert._with_columns))
        return one_expert.scaled(weight.T, 3.0), *dropped

    whole = run()
    monkeypatch.setattr(one_expert, "_PIECE", 64)
    pieces = run()
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    assert torch.equal(whole[0], (weight.T.float() * 3.0).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_of_pieces_has_the_noise_and_the_moments_of_the_whole(dtype):
    weight = torch.randn(one_expert.STREAMED * 5 // 2).to(dtype)
    for pieces in (weight.split(one_expert.STREAMED), weight.split(2 * one_expert.STREAMED)):
        noise = one_expert.Noise(0.1, 0, "key")
        assert torch.equal(torch.cat([noise(piece) for piece in pieces]), one_expert.Noise(0.1, 0, "key")(weight))
        assert one_expert.moments_of(lambda: pieces) == moments(weight)  # noqa: B023  # called at once


def test_moments_do_not_depend_on_threads_and_agree_with_torch():
    parts = [torch.randn(1500, 900), torch.randn(1500, 900) + 0.1]
    results = set()
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.add(moments(*parts))
        torch.set_num_threads(before)
    (mean, std), whole = results.pop(), torch.cat(parts).double()
    assert not results
    assert mean == pytest.approx(float(whole.mean()), rel=1e-12)
    assert std == pytest.approx(float(whole.std(correction=0)), rel=1e-12)
