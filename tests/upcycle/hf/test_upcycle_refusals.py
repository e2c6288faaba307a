"""What is refused, before anything is written: the message names the field and what to do instead."""

from __future__ import annotations

import json

import pytest
import torch
from dense_zoo import save, saved
from safetensors.torch import load_file, save_file

from moepass import errors
from moepass.upcycle.command import upcycle_checkpoint
from moepass.upcycle.hf.families import FAMILIES, FEATURES, NO_HOST
from moepass.upcycle.hf.hosts import HOSTS
from moepass.upcycle.hf.match import match

WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}


@pytest.mark.parametrize(
    ("config", "to", "field", "remedy"),
    [
        ({"model_type": "llama", "attention_bias": True}, None, "attention_bias=True", "use --to granitemoe"),
        ({"model_type": "llama", "mlp_bias": True}, None, "mlp_bias=True", "moepass.convert"),
        ({"model_type": "mistral"}, "qwen2_moe", "sliding_window=4096", "use --to mixtral"),
        ({"model_type": "phi3", **PARTIAL}, None, "partial_rotary_factor=0.5", "use --to glm4_moe"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, None, "0.75", "use --to glm4_moe"),
        ({"model_type": "phi3", "sliding_window": 5, **PARTIAL}, None, "partial_rotary_factor", "moepass.convert"),
        ({"model_type": "qwen3", **WINDOWS}, None, "layer_types='sliding_attention'", "use --to mellum"),
        ({"model_type": "qwen3", "attention_bias": True}, "glm4_moe", "attention_bias=True", "use --to qwen3_moe"),
        ({"model_type": "ernie4_5", "use_bias": True}, None, "use_bias=True", "moepass.convert"),
        ({"model_type": "granite", "mlp_bias": True}, None, "mlp_bias=True", "moepass.convert"),
        ({"model_type": "seed_oss"}, "mixtral", "attention_bias=True", "use --to qwen2_moe"),
        ({"model_type": "seed_oss", "attention_out_bias": True}, None, "attention_out_bias=True", "moepass.convert"),
    ],
)
def test_a_feature_that_the_host_lacks_is_named_with_the_nearest_alternative(config, to, field, remedy):
    with pytest.raises(errors.HostRefuses) as refusal:
        match(config, to)
    assert field in str(refusal.value)
    assert remedy in str(refusal.value)


@pytest.mark.parametrize("model_type", NO_HOST)
def test_families_whose_names_fit_but_whose_function_does_not_are_refused(model_type):
    with pytest.raises(errors.NoHost, match="model_type"):
        match({"model_type": model_type})


@pytest.mark.parametrize(
    ("model_type", "says"),
    [("mixtral", "mixture of experts already"), ("qwen33", "did you mean qwen3"), (None, "those are llama, mistral")],
)
def test_other_model_types_get_a_hint(model_type, says):
    with pytest.raises(errors.NoHost, match=says):
        match({"model_type": model_type})


def test_a_host_outside_the_whitelist_is_refused_with_the_list():
    with pytest.raises(errors.BadOption, match="qwen3 can become qwen3_moe, mellum, glm4_moe"):
        match({"model_type": "qwen3"}, "mixtral")


def test_the_tables_are_consistent():
    assert not set(NO_HOST) & set(FAMILIES)
    assert {name for family in FAMILIES.values() for name in family.hosts} == set(HOSTS)
    assert {feature for host in HOSTS.values() for feature in host.supports} <= set(FEATURES)
    for family in FAMILIES.values():
        for name in family.hosts:
            assert set(family.always) <= HOSTS[name].supports


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"top_k": 1}, errors.BadOption, "could never learn"),
        ({"top_k": 9}, errors.TopKTooLarge, "top_k=9"),
        ({"experts": 1, "top_k": 1}, errors.BadOption, "dense model"),
        ({"experts": 0}, errors.BadOption, "at least 1"),
        ({"init": "virtual-groups", "top_k": 3}, errors.NotDivisible, "granularity=2"),
        ({"init": "virtual-groups", "granularity": 5, "experts": 10, "top_k": 5}, errors.NotDivisible, "width=48"),
        ({"init": "split", "experts": 5, "top_k": 5}, errors.NotDivisible, "divisor of 48"),
        ({"init": "clone"}, errors.BadOption, "copy, virtual-groups"),
        ({"router": "zero"}, errors.BadOption, "no gradient"),
        ({"router": "kaiming"}, errors.BadOption, "orthogonal"),
        ({"router": "centroids"}, errors.BadOption, "for --init split or cluster, not copy"),
        ({"drop_indices": "both"}, errors.BadOption, "shared, independent"),
        ({"drop_indices": "independent"}, errors.BadOption, "for --init drop, not copy"),
        ({"cluster_on": "gradients"}, errors.BadOption, "weights, activations"),
        ({"cluster_on": "activations"}, errors.BadOption, "for --init cluster, not copy"),
        ({"init": "cluster", "cluster_on": "activations"}, errors.BadOption, "--calibration-tokens"),
        ({"init": "cluster", "experts": 5}, errors.NotDivisible, "divisor of 48"),
        ({"shared": 8}, errors.BadOption, "for --init split or cluster, not copy"),
        ({"init": "split", "shared": -8}, errors.BadOption, "number of neurons"),
        (
            {"init": "split", "shared": 8},
            errors.BadOption,
            "hosts that have one are qwen2_moe, glm4_moe",
        ),
        ({"init": "split", "shared": 9, "to": "qwen2_moe"}, errors.BadOption, "can share 8 or 16"),
        ({"init": "split", "shared": 9, "to": "glm4_moe", "experts": 4}, errors.BadOption, "can share 16 or 24 or 32"),
        ({"init": "split", "shared": 8, "to": "qwen2_moe"}, errors.BadOption, "--calibration"),
        ({"router_std": 0.0}, errors.BadOption, "above 0"),
        ({"noise_std": -1.0}, errors.BadOption, "at least 0"),
        ({"drop_ratio": 2.0}, errors.BadOption, "between 0 and 1"),
        ({"seed": -1}, errors.BadOption, "from 0 on"),
        ({"renormalize": False}, errors.BadOption, "mixtral always renormalises"),
        ({"dtype": "int8"}, errors.BadOption, "float32, bfloat16"),
        ({"max_shard_size": "5 potatoes"}, errors.BadOption, "500MB or 5GB"),
        ({"layers": "model.layers.7.*"}, errors.BadOption, "model.layers.0.mlp to model.layers.1.mlp"),
        ({"layers": "*.1.mlp"}, errors.BadOption, "cannot leave the layers \\[0\\] dense; use --to qwen2_moe"),
        ({"layers": "*.0.mlp", "to": "glm4_moe"}, errors.BadOption, "use --to qwen2_moe"),
    ],
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, dict) else "",
)
def test_impossible_recipes_are_refused(options, error, says, tmp_path):
    with pytest.raises(error, match=says):
        upcycle_checkpoint(saved("llama"), tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists(), "nothing may be written"


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "q_proj.bias' has no place in"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(48)}), "up_proj.bias' has no place in"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight' is missing"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight' is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight' is missing"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(40, 32)}), r"shape \[40, 32\], not \[48"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), r"shape \[31\], not \[32\]"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}), "layers.2.*has no place in"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(change, says, tmp_path):
    src = save(tmp_path / "src", "llama")
    _edit(src, change)
    with pytest.raises(errors.UnexpectedTensor, match=says):
        upcycle_checkpoint(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_fused_matrix_of_the_wrong_height_is_refused(tmp_path):
    src = save(tmp_path / "src", "phi3")
    _edit(src, lambda t: t.update({"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(48, 32)}))
    with pytest.raises(errors.UnexpectedTensor, match="48 rows, the config says 64"):
        upcycle_checkpoint(src, tmp_path / "dst")


def test_an_invalid_config_is_an_error_of_ours(tmp_path):
    src = save(tmp_path / "src", "llama")
    content = json.loads((src / "config.json").read_text()) | {"hidden_size": "wide"}
    (src / "config.json").write_text(json.dumps(content))
    with pytest.raises(errors.NoHost, match=r"config\.json is not valid"):
        upcycle_checkpoint(src, tmp_path / "dst")
