"""The output's config: nothing leaks in from the host's defaults, old and short configs mean what they meant."""

from __future__ import annotations

import json

import pytest
import torch
from dense_zoo import S, error, load, logits, save, saved
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig

from moepass.upcycle.command import upcycle_checkpoint
from moepass.upcycle.hf.config import host_config
from moepass.upcycle.hf.families import FAMILIES
from moepass.upcycle.hf.hosts import HOSTS, Shape
from moepass.upcycle.hf.match import declared, match

PAIRS = [(family.model_type, host) for family in FAMILIES.values() for host in family.hosts]
NEEDS = {"mistral": {"sliding_window": None}, "seed_oss": {"attention_bias": False}}


def made(dense, host, **config):
    found = match({"model_type": dense, **NEEDS.get(dense, {}), **config}, host)
    layers = tuple(range(found.config.num_hidden_layers))
    width = found.config.intermediate_size // 2
    shape = Shape(8, 2, width, True, layers, len(layers), found.config, found.features)
    return found, host_config(found, shape, None)


@pytest.mark.parametrize(("dense", "host"), PAIRS, ids=lambda v: v)
def test_every_field_of_this_transformers_is_decided(dense, host):
    _, config = made(dense, host)
    unknown = [w for w in config.warnings if "new to moepass" in w or "does not know" in w]
    assert unknown == []
    renamed = type(config.config).attribute_map
    written = set(config.json)
    assert {renamed.get(name, name) for name in declared(config.config)} <= written


@pytest.mark.parametrize(("dense", "host"), PAIRS, ids=lambda v: v)
def test_what_both_know_is_the_dense_value(dense, host):
    values = {"rms_norm_eps": 3e-4, "max_position_embeddings": 77, "initializer_range": 0.123, "vocab_size": 99,
              "eos_token_id": [4, 5], "pad_token_id": 3, "num_key_value_heads": 1, "num_attention_heads": 4,
              "hidden_size": 64, "num_hidden_layers": 4,
              "rope_parameters": {"rope_type": "default", "rope_theta": 7e3}}  # fmt: skip
    found, config = made(dense, host, **values)
    for name in set(values) - {"rope_parameters"}:
        if hasattr(found.config, name) and name != "rms_norm_eps":
            assert getattr(config.config, name) == getattr(found.config, name), name
    eps = "layer_norm_eps" if dense == "cohere2" else "rms_norm_eps"
    assert getattr(config.config, eps) == getattr(found.config, eps)
    assert json.dumps(config.json["rope_parameters"]).count("7000.0") >= 1


def test_the_written_config_is_read_back_as_it_was_meant(tmp_path):
    src = saved("qwen3")
    upcycle_checkpoint(src, tmp_path / "dst")
    config = AutoConfig.from_pretrained(tmp_path / "dst")
    assert config.architectures == ["Qwen3MoeForCausalLM"]
    assert config.norm_topk_prob is True
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (8, 2, 48)
    raw = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert raw["num_experts"] == raw["num_local_experts"] == 8, "readers look for either"


def _shorten(folder, keep):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: raw[k] for k in keep}))


def test_a_short_old_config_is_completed_by_its_own_class(tmp_path):
    src = save(tmp_path / "src", "llama", num_key_value_heads=4, max_position_embeddings=2048)
    keep = ["model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads"]  # fmt: skip
    _shorten(src, keep)
    upcycle_checkpoint(src, tmp_path / "dst")
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert (config["rms_norm_eps"], config["num_key_value_heads"], config["max_position_embeddings"]) == (1e-6, 4, 2048)
    assert config["rope_parameters"]["rope_theta"] == 10000.0, "mixtral's default would be a million"
    assert error(src, tmp_path / "dst") <= 5e-6


def test_a_stray_key_that_the_dense_model_ignores_does_not_reach_the_host(tmp_path):
    src = save(tmp_path / "src", "llama")
    raw = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(raw | {"sliding_window": 3, "auto_map": {"AutoConfig": "evil.py"}}))
    upcycle_checkpoint(src, tmp_path / "dst")
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["sliding_window"] is None
    assert "auto_map" not in config
    assert error(src, tmp_path / "dst") <= 5e-6


def test_the_old_way_to_write_position_scaling_is_understood(tmp_path):
    src = save(tmp_path / "src", "phi3", original_max_position_embeddings=16)
    raw = json.loads((src / "config.json").read_text())
    raw.pop("rope_parameters")
    scaling = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    (src / "config.json").write_text(json.dumps(raw | {"rope_theta": 5000.0, "rope_scaling": scaling}))
    assert S > 16, "the long factors must act"
    upcycle_checkpoint(src, tmp_path / "dst")
    assert error(src, tmp_path / "dst") <= 5e-6


def test_an_untied_head_on_disk_is_kept_even_where_the_config_ties(tmp_path):
    src = save(tmp_path / "src", "llama", tie_word_embeddings=True)
    tensors = load_file(src / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    upcycle_checkpoint(src, tmp_path / "dst")
    assert error(src, tmp_path / "dst") <= 5e-6


def test_frequencies_of_old_checkpoints_are_left_out(tmp_path):
    src = save(tmp_path / "src", "llama")
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    report = upcycle_checkpoint(src, tmp_path / "dst")
    assert not [name for name in report.content["tensors"] if "inv_freq" in name]


def test_dropout_that_the_host_lacks_is_reported(tmp_path):
    src = save(tmp_path / "src", "seed_oss", residual_dropout=0.1)
    report = upcycle_checkpoint(src, tmp_path / "dst", dry_run=True)
    assert any("residual_dropout=0.1 acts in training only" in w for w in report.warnings)
    assert any("head_dim=16 differs" in w for w in report.warnings)


@pytest.mark.parametrize("host", HOSTS)
def test_this_transformers_has_the_host(host):
    assert host in CONFIG_MAPPING


def test_precision_of_the_router_is_the_hosts_own(tmp_path):
    src = save(tmp_path / "src", "hunyuan_v1_dense", dtype=torch.bfloat16)
    upcycle_checkpoint(src, tmp_path / "dst")
    written = load_file(tmp_path / "dst" / "model.safetensors")
    assert written["model.layers.0.mlp.gate.wg.weight"].dtype == torch.float32
    assert written["model.layers.0.mlp.experts.3.up_proj.weight"].dtype == torch.bfloat16
    assert torch.isfinite(logits(load(tmp_path / "dst"))).all()
