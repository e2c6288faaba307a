"""Options of the command together: parents with methods, prompts with measured errors, the own format's limits."""

from __future__ import annotations

import json

import pytest
import torch
from dense_zoo import load, saved

from moepass import errors
from moepass.reference import route
from moepass.upcycle.command import upcycle_checkpoint
from moepass.upcycle.hf.step0 import TOKENS
from moepass.upcycle.one_expert import generator

#: One prompt of token ids for each of four experts.
PROMPTS = [[[5, 9, 13]], [[21, 22]], [[40, 3, 7]], [[50]]]


def relative_error(dense, made):
    """Of layer 0's block on the inputs that the command takes, by the modules of stock transformers."""
    x = torch.randn(TOKENS, 32, generator=generator(0, "model.layers.0.mlp/step0"))
    block, moe = dense.model.layers[0].mlp, made.model.layers[0].mlp
    with torch.no_grad():
        expected, found = block(x), moe(x[None])
        found = (found[0] if isinstance(found, tuple) else found).reshape(TOKENS, -1)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("others", ["average", "base"])
@pytest.mark.parametrize("method", ["copy", "noise"])
def test_the_measured_error_of_parents_is_that_of_their_blocks(method, others, fine_tune, tmp_path):
    src = saved("qwen3")
    folders = [fine_tune(src, "math"), fine_tune(src, "code")]
    report = upcycle_checkpoint(
        src, tmp_path / "dst", to="qwen3_moe", experts_from=folders, others=others, init=method, router_std=3.0
    )

    measured = json.loads((tmp_path / "dst" / "moepass_upcycle.json").read_text())["measured"]

    assert not report.exact
    assert measured["error"] > 0.01
    expected = relative_error(load(src), load(tmp_path / "dst"))
    assert measured["error"] == pytest.approx(expected, rel=6e-3)  # three digits


def test_a_router_from_prompts_is_the_one_that_is_measured(tmp_path):
    src = saved("llama")
    options = {"init": "drop", "experts": 4, "to": "mixtral", "router_std": 3.0}
    report = upcycle_checkpoint(src, tmp_path / "dst", router="prompts", prompts=PROMPTS, **options)

    expected = relative_error(load(src), load(tmp_path / "dst"))
    assert report.facts.measured.error == pytest.approx(expected, rel=6e-3)
    other = upcycle_checkpoint(src, tmp_path / "other", dry_run=True, **options)
    assert other.facts.measured.error != report.facts.measured.error


def test_prompts_decide_the_router_of_a_block_before_its_experts_are_asked(tmp_path):
    src = saved("llama")
    report = upcycle_checkpoint(src, tmp_path / "dst", experts=4, to="mixtral", router="prompts", prompts=PROMPTS)
    weight = load(tmp_path / "dst").model.layers[0].mlp.gate.weight
    dense = load(src)
    seen = []
    dense.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for (prompt,) in PROMPTS:
            dense(torch.tensor([prompt]))
    first = [int(route(x.mean(0, keepdim=True) @ weight.T, report.facts.plan.spec.router).index_TK[0, 0]) for x in seen]
    assert first == [0, 1, 2, 3]


@pytest.mark.parametrize("options", [{"init": "cluster"}, {"init": "split", "shared": 16, "to": "qwen2_moe"}])
def test_parts_of_one_block_have_no_several_parents(options, fine_tune, tmp_path):
    src = saved("qwen2" if "shared" in options else "llama")
    with pytest.raises(errors.BadOption, match=r"whole|calibration"):
        upcycle_checkpoint(src, tmp_path / "dst", experts_from=[src, src], experts=2, **options)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("name", "value", "extra"),
    [
        ("experts_from", ["elsewhere"], {}),
        ("prompts", PROMPTS, {"router": "prompts"}),
        ("calibration_tokens", [1, 2, 3], {}),
        ("router", "centroids", {"init": "cluster"}),
        ("cluster_on", "activations", {"init": "cluster"}),
        ("shared", 16, {"init": "split"}),
    ],
)
def test_what_needs_a_family_is_refused_for_the_own_format(name, value, extra, tmp_path):
    with pytest.raises(errors.BadOption, match=name):
        upcycle_checkpoint(saved("llama"), tmp_path / "dst", to="moepass", **{name: value}, **extra)
    assert not (tmp_path / "dst").exists()


def test_clusters_of_weights_in_the_own_format_are_those_of_convert(tmp_path):
    import moepass

    src = saved("llama")
    upcycle_checkpoint(src, tmp_path / "dst", to="moepass", init="cluster", experts=4, top_k=4)
    ours = moepass.load(tmp_path / "dst")
    theirs = load(src)
    spec = moepass.MoESpec(router=moepass.RouterSpec(top_k=4), experts=moepass.ExpertSpec(num_experts=4))
    moepass.convert(theirs, spec, init="cluster")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize(("family", "method"), [("gpt2", "drop"), ("llama", "noise"), ("gpt2", "copy")])
def test_the_own_format_measures_its_first_block_too(family, method, tmp_path):
    import moepass

    src = saved(family)
    report = upcycle_checkpoint(src, tmp_path / "dst", to="moepass", init=method, router_std=3.0)
    if method == "copy":
        assert report.exact
        assert report.facts.measured is None
        return
    site = "transformer.h.0.mlp" if family == "gpt2" else "model.layers.0.mlp"
    x = torch.randn(TOKENS, 32, generator=generator(0, f"{site}/step0"))
    with torch.no_grad():
        expected = load(src).get_submodule(site)(x[None])[0]
        found = moepass.load(tmp_path / "dst").get_submodule(site)(x[None])[0]
    error = float((found - expected).norm() / expected.norm())
    assert error > 0.01
    assert report.facts.measured.error == pytest.approx(error, rel=6e-3)
