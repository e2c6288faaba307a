"""What lies in DST beside the weights: report, model card, tokenizer files; and what a dry run says about it."""

from __future__ import annotations

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from dense_zoo import load, save, saved
from safetensors import safe_open

import moepass
from moepass import errors
from moepass.upcycle.command import parse_size, upcycle_checkpoint
from moepass.upcycle.hf.families import FAMILIES
from moepass.upcycle.hf.sizes import human

SHARED = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


@SHARED
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ["copy", "virtual-groups"])
def test_a_dry_run_predicts_the_real_thing_and_writes_nothing(family, init, tmp_path):
    src, dst = saved(family, tie_word_embeddings=True), tmp_path / "dst"
    planned = upcycle_checkpoint(src, dst, init=init, experts=4, max_shard_size="60KB", dry_run=True)
    assert not dst.exists()
    done = upcycle_checkpoint(src, dst, init=init, experts=4, max_shard_size="60KB")
    assert planned.content == done.content
    assert dict(planned.sizes.shards) == {p.name: p.stat().st_size for p in dst.glob("*.safetensors")}
    assert len(planned.sizes.shards) > 1
    model = load(dst)
    assert planned.sizes.parameters == sum(p.numel() for p in {*model.parameters()}) + _buffers(model)


def _buffers(model):
    """Selection biases are on disk; glm4_moe keeps them as buffers."""
    return sum(t.numel() for n, t in model.state_dict().items() if n not in dict(model.named_parameters()) and
               "lm_head" not in n)  # fmt: skip


def test_counts_are_those_of_mixtral_8x7b(tmp_path):
    """46.7e9 parameters, 12.9e9 active (Mixtral of Experts, 2401.04088) from a source of Mistral's shape."""
    D, F, L, V, kv = 4096, 14336, 32, 32000, 1024
    shapes = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    layer = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D),
             "self_attn.o_proj": (D, D), "input_layernorm": (D,), "post_attention_layernorm": (D,),
             "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}  # fmt: skip
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(L) for name, shape in layer.items()}
    _sparse_checkpoint(tmp_path / "src", shapes)
    (tmp_path / "src" / "config.json").write_text(json.dumps({"model_type": "mistral", "sliding_window": None}))
    sizes = upcycle_checkpoint(tmp_path / "src", tmp_path / "dst", dry_run=True).sizes
    assert sizes.parameters == pytest.approx(46.7e9, rel=1e-3)
    assert sizes.active_parameters == pytest.approx(12.9e9, rel=2e-3)
    assert sizes.dense_parameters == pytest.approx(7.24e9, rel=1e-3)
    assert sizes.flops_per_token == 2 * (sizes.active_parameters - V * D - (2 * L + 1) * D)
    assert max(size for _, size in sizes.shards) <= 5e9
    assert sizes.nbytes == pytest.approx(2 * sizes.parameters, rel=1e-5)


def test_a_dry_run_tells_that_the_disk_is_too_small(tmp_path, monkeypatch):
    full = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=full.f_frsize))
    report = upcycle_checkpoint(saved("llama"), tmp_path / "dst", dry_run=True)
    assert any("GB free" in w for w in report.warnings)
    with pytest.raises(errors.BadDestination, match="no_space"):
        upcycle_checkpoint(saved("llama"), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def _sparse_checkpoint(folder, shapes):
    """A file of the right size without blocks on disk."""
    folder.mkdir()
    entries, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + position)


def test_the_report_says_where_every_tensor_comes_from(tmp_path):
    src = saved("qwen3")
    upcycle_checkpoint(src, tmp_path / "dst", init="virtual-groups", experts=4, seed=5)
    report = json.loads((tmp_path / "dst" / "moepass_upcycle.json").read_text())
    with safe_open(tmp_path / "dst" / "model.safetensors", "pt") as file:
        assert set(report["tensors"]) == set(file.keys())
    down = report["tensors"]["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert down["from"] == ["model.layers.1.mlp.down_proj.weight"]
    assert "scale=2.0" in down["how"]
    assert report["tensors"]["model.norm.weight"] == {"from": ["model.norm.weight"], "how": "copied"}
    assert report["verdict"]["exact"] is True
    assert report["recipe"]["seed"] == 5
    assert report["versions"]["torch"] == torch.__version__
    assert len(report["fingerprints"]["source"]) == 64


def test_the_model_card_gets_one_section_and_keeps_the_rest(tmp_path):
    src = save(tmp_path / "src", "llama")
    (src / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n\nText.\n")
    upcycle_checkpoint(src, tmp_path / "dst")
    card = (tmp_path / "dst" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# Tiny\n\nText.\n\n")
    assert "## Upcycled with moepass" in card
    assert "EXACT" in card
    assert str(tmp_path) not in card, "the bytes must not depend on this machine"
    (src / "README.md").write_text(card + "after\n")
    upcycle_checkpoint(src, tmp_path / "again")
    again = (tmp_path / "again" / "README.md").read_text()
    assert again == card + "after\n", "an older section is replaced, not repeated"


def test_small_files_go_along_and_weights_code_and_foreign_links_stay(tmp_path):
    src = save(tmp_path / "src", "llama")
    (tmp_path / "secret.txt").write_text("secret")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "merges.txt"):
        (src / name).write_text(name)
    (src / "modeling_llama.py").write_text("raise SystemExit")
    (src / "pytorch_model.bin").write_bytes(b"x")
    (src / ".hidden").write_text("x")
    (src / "link.txt").symlink_to(tmp_path / "secret.txt")
    (src / "folder").mkdir()
    report = upcycle_checkpoint(src, tmp_path / "dst")
    ours = {"config.json", "model.safetensors", "README.md", "moepass_upcycle.json", "generation_config.json"}
    assert {p.name for p in (tmp_path / "dst").iterdir()} == ours | {
        "tokenizer.json", "chat_template.jinja", "LICENSE", "merges.txt"}  # fmt: skip
    assert any("modeling_llama.py was not copied" in w for w in report.warnings)
    assert any("link.txt was not copied" in w for w in report.warnings)


def test_a_broken_generation_config_is_refused(tmp_path):
    src = save(tmp_path / "src", "llama")
    (src / "generation_config.json").write_text("{")
    with pytest.raises(errors.BadCheckpoint, match="not JSON"):
        upcycle_checkpoint(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_verification_is_in_the_report(tmp_path):
    exact = moepass.upcycle_checkpoint(saved("qwen3"), tmp_path / "a", experts=4, verify=True)
    assert exact.verified.passed
    assert not exact.broken
    noisy = moepass.upcycle_checkpoint(saved("qwen3"), tmp_path / "b", experts=4, init="noise", verify=True)
    assert not noisy.verified.passed
    assert not noisy.broken, "it never promised"
    assert json.loads(noisy.to_json())["verified"]["comparisons"][0]["logits"]["relative"] > 1e-4


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kB", 1500), ("2GiB", 2 << 30), ("77", 77), (8, 8)]
)
def test_sizes_are_read_as_they_are_said(text, size):
    assert parse_size(text) == size


def test_numbers_are_shown_with_a_unit():
    assert [human(n) for n in (7, 1500, 46_702_792_704)] == ["7", "1.50 k", "46.70 G"]
