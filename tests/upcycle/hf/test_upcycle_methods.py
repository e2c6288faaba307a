"""Shared experts, clusters and routers made from data; and the error at step 0 against an independent one."""

from __future__ import annotations

import json

import pytest
import torch
from dense_zoo import V, error, load, saved
from safetensors.torch import load_file

from moepass.upcycle.command import upcycle_checkpoint
from moepass.upcycle.one_expert import generator

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

TOLERANCE = 5e-6
IDS = torch.randint(V, (3, 40), generator=torch.Generator().manual_seed(4)).tolist()
#: Dense family, host, neurons of 48 that are shared beside four routed experts.
SHARED = [
    ("qwen2", "qwen2_moe", 16),
    ("llama", "glm4_moe", 16),
    ("qwen3", "glm4_moe", 32),
    ("ernie4_5", "ernie4_5_moe", 16),
    ("cohere2", "cohere2_moe", 16),
    ("qwen3_5_text", "qwen3_5_moe_text", 32),
]


def written(folder):
    return load_file(folder / "model.safetensors")


def activity(folder, layer=0):
    """Input and activations ``[T, D]``, ``[T, F]`` of a block of the whole dense model on IDS."""
    model, seen = load(folder), {}
    mlp = model.model.layers[layer].mlp
    mlp.register_forward_pre_hook(lambda m, args: seen.__setitem__("x", args[0].flatten(0, 1)))
    mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.__setitem__("a", args[0].flatten(0, 1)))
    with torch.no_grad():
        model(torch.tensor(IDS))
    return seen["x"], seen["a"]


@pytest.mark.parametrize(("dense", "host", "N"), SHARED, ids=lambda v: str(v))
@pytest.mark.parametrize("init", ["split", "cluster"])
def test_a_shared_expert_beside_all_routed_ones_is_the_dense_block(dense, host, N, init, tmp_path):
    src = saved(dense)
    report = upcycle_checkpoint(
        src, tmp_path / "dst", to=host, init=init, experts=4, top_k=4, shared=N, calibration_tokens=IDS
    )
    assert report.exact
    assert f"{N} of 48 neurons in the shared expert" in str(report)
    assert report.facts.measured is None
    assert error(src, tmp_path / "dst") <= TOLERANCE


def test_a_mandatory_shared_expert_takes_as_many_neurons_as_the_others(tmp_path):
    options = {"init": "split", "experts": 3, "top_k": 3, "shared": 12, "calibration_tokens": IDS}
    src = saved("hunyuan_v1_dense")
    report = upcycle_checkpoint(src, tmp_path / "dst", **options)
    assert not any("starts at zero and costs" in w for w in report.warnings)
    assert error(src, tmp_path / "dst") <= TOLERANCE


def test_the_shared_expert_holds_the_most_active_neurons_and_every_other_is_in_one_expert(tmp_path):
    src = saved("qwen2")
    upcycle_checkpoint(src, tmp_path / "dst", init="split", experts=4, shared=8, calibration_tokens=IDS)
    dense, made = written(src), written(tmp_path / "dst")
    block = "model.layers.0.mlp."
    gate, down = dense[f"{block}gate_proj.weight"], dense[f"{block}down_proj.weight"]
    top = activity(src)[1].abs().mean(0).topk(8).indices.sort().values
    assert torch.equal(made[f"{block}shared_expert.gate_proj.weight"], gate[top])
    assert torch.equal(made[f"{block}shared_expert.down_proj.weight"], 2 * down[:, top]), "its gate halves it"
    rest = torch.tensor([j for j in range(48) if j not in top])
    routed = torch.cat([made[f"{block}experts.{e}.gate_proj.weight"] for e in range(4)])
    assert torch.equal(routed, gate[rest])


@pytest.mark.parametrize("on", ["weights", "activations"])
def test_clusters_are_equal_and_every_neuron_is_in_one_of_them(on, tmp_path):
    src = saved("qwen3")
    text = {"calibration_tokens": IDS} if on == "activations" else {}
    upcycle_checkpoint(src, tmp_path / "dst", init="cluster", cluster_on=on, experts=4, **text)
    gate = written(src)["model.layers.0.mlp.gate_proj.weight"]
    rows = [written(tmp_path / "dst")[f"model.layers.0.mlp.experts.{e}.gate_proj.weight"] for e in range(4)]
    assert all(len(r) == 12 for r in rows)
    assert sorted(map(tuple, torch.cat(rows).tolist())) == sorted(map(tuple, gate.tolist()))
    assert not torch.equal(torch.cat(rows), gate)


@pytest.mark.parametrize("init", ["split", "cluster"])
def test_centroids_with_a_calibration_are_mean_inputs_weighted_by_activity(init, tmp_path):
    src, options = saved("qwen3"), {"init": init, "experts": 4, "router": "centroids", "router_std": 0.2}
    upcycle_checkpoint(src, tmp_path / "dst", calibration_tokens=IDS, **options)
    made, dense = written(tmp_path / "dst"), written(src)["model.layers.1.mlp.gate_proj.weight"]
    x, a = activity(src, layer=1)
    rows = []
    for e in range(4):
        expert = made[f"model.layers.1.mlp.experts.{e}.gate_proj.weight"]
        neurons = [int((dense == row).all(1).nonzero()) for row in expert]
        weight = a[:, neurons].abs().mean(1, keepdim=True)
        rows.append((weight * x).sum(0) / weight.sum())
    centred = torch.stack(rows) - torch.stack(rows).mean(0)
    expected = 0.2 * centred / centred.norm(dim=1, keepdim=True)
    torch.testing.assert_close(made["model.layers.1.mlp.gate.weight"], expected, rtol=1e-3, atol=1e-4)


def test_centroids_without_one_are_mean_rows(tmp_path):
    src = saved("qwen3")
    upcycle_checkpoint(src, tmp_path / "dst", init="split", experts=4, router="centroids")
    mean = written(src)["model.layers.0.mlp.gate_proj.weight"].view(4, 12, 32).mean(1)
    expected = 0.1 * mean / mean.norm(dim=1, keepdim=True)
    torch.testing.assert_close(written(tmp_path / "dst")["model.layers.0.mlp.gate.weight"], expected)


def test_a_uniform_router_is_bounded_and_has_the_deviation_asked(tmp_path):
    upcycle_checkpoint(saved("qwen3"), tmp_path / "dst", experts=48, router="uniform", router_std=0.2)
    scaled = written(tmp_path / "dst")["model.layers.0.mlp.gate.weight"] * 32**0.5 / 0.2
    assert float(scaled.abs().max()) <= 3**0.5
    assert float(scaled.std()) == pytest.approx(1.0, abs=0.05)


APPROXIMATE = [
    ("qwen3", "qwen3_moe", {"init": "drop"}),
    ("qwen3", "qwen3_moe", {"init": "drop", "drop_indices": "independent"}),
    ("qwen3", "qwen3_moe", {"renormalize": False}),
    ("qwen3", "qwen3_moe", {"dtype": "bfloat16"}),
    ("llama", "mixtral", {"init": "cluster"}),
    ("phi3", "mixtral", {"init": "noise"}),
    ("granite", "granitemoe", {"init": "cluster", "router": "centroids"}),
    ("llama", "glm4_moe", {"init": "cluster", "shared": 16, "cluster_on": "activations"}),
    ("qwen2", "qwen2_moe", {"init": "split", "shared": 16, "router": "centroids"}),
    ("ernie4_5", "ernie4_5_moe", {"init": "split"}),
]


def ffn_error(src, dst, x, attribute="mlp"):
    """What stock transformers makes of the first block of both."""
    outputs = []
    for folder, name in ((src, "mlp"), (dst, attribute)):
        with torch.no_grad():
            out = getattr(load(folder).model.layers[0], name)(x[None])
        outputs.append((out if isinstance(out, torch.Tensor) else out[0])[0])
    return float((outputs[1] - outputs[0]).norm() / outputs[0].norm())


@pytest.mark.parametrize(
    ("dense", "host", "options"), APPROXIMATE, ids=lambda v: v if isinstance(v, str) else "-".join(v)
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_measured_error_is_what_stock_transformers_computes(dense, host, options, calibrated, tmp_path):
    src = saved(dense)
    text = {"calibration_tokens": IDS} if calibrated or "shared" in options else {}
    planned = upcycle_checkpoint(src, tmp_path / "dst", to=host, experts=4, seed=3, dry_run=True, **options, **text)
    done = upcycle_checkpoint(src, tmp_path / "dst", to=host, experts=4, seed=3, **options, **text)
    assert planned.content == done.content
    measured = done.content["measured"]
    x = torch.randn(256, 32, generator=generator(3, "model.layers.0.mlp/step0"))
    if text:
        x = activity(src)[0]
    inside = "block_sparse_moe" if host == "granitemoe" else "mlp"
    assert measured["error"] == pytest.approx(ffn_error(src, tmp_path / "dst", x, inside), rel=6e-3)
    assert (measured["layer"], measured["tokens"]) == (0, len(x))
    assert measured["inputs"] == ("calibration" if text else "gaussian")
    assert f"relative error {measured['error']:.3g}" in str(done)
    assert f"relative error {measured['error']:.3g}" in (tmp_path / "dst" / "README.md").read_text()
    written_report = json.loads((tmp_path / "dst" / "moepass_upcycle.json").read_text())
    assert written_report["measured"] == measured


def test_a_calibration_that_nothing_looks_at_is_mentioned(tmp_path):
    report = upcycle_checkpoint(saved("llama"), tmp_path / "dst", calibration_tokens=IDS, dry_run=True)
    assert "nothing in this recipe looks at the calibration" in report.warnings


def test_what_is_exact_has_nothing_to_measure(tmp_path):
    report = upcycle_checkpoint(saved("llama"), tmp_path / "dst", init="cluster", experts=4, top_k=4, router="normal")
    assert report.exact
    assert report.content["measured"] is None
    assert any("the router starts at zero, not normal" in w for w in report.warnings)
    assert error(saved("llama"), tmp_path / "dst") <= TOLERANCE
