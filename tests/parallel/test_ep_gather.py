"""``moepass gather``: what was trained in shards becomes a folder that stock transformers loads, bit for bit."""

from __future__ import annotations

import json

import dense_zoo
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from typer.testing import CliRunner

import moepass
from moepass import errors
from moepass.cli import app
from moepass.parallel import gather, parallelize, save_checkpoint
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec, RouterSpec
from moepass.upcycle.hf.families import FAMILIES

SIGMOID = RouterSpec(score="sigmoid", bias=True, bias_update_rate=0.01, normalize_eps=1e-20)


@pytest.fixture
def mesh(tmp_path):
    """One rank."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
    dist.destroy_process_group()


def converted(family: str, router: RouterSpec | None = None, **parts) -> nn.Module:
    """With weights that only training could have made."""
    model = dense_zoo.build(family)
    spec = MoESpec(router=router or RouterSpec(), experts=ExpertSpec(num_experts=4), **parts)
    moepass.convert(model, spec, init="copy")
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in blocks(model):
            for p in block.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) * p.shape[-1] ** -0.5)
            if block.router.bias is not None:
                block.router.bias.copy_(torch.randn(4, generator=draw))
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, moepass.nn.MoE)]


def stored(model: nn.Module, mesh, folder) -> None:
    save_checkpoint(parallelize(model, mesh), folder)


def assert_same_bits(model: nn.Module, host: nn.Module) -> None:
    """Experts of every layer, and whatever has the same name in both."""
    ours, theirs = model.state_dict(), host.state_dict()
    same = [name for name in theirs if name in ours]
    assert len(same) > len(theirs) // 3, "Phi-3 fuses its projections, all else is called the same"
    assert all(torch.equal(theirs[name], ours[name]) for name in same)
    stacks = [t for name, t in theirs.items() if t.dim() == 3 and name not in ours and "conv" not in name]
    wanted = [t for block in blocks(model) for t in (block.w_in, block.w_out)]
    assert len(stacks) == len(wanted)
    for tensor in wanted:
        whole = tensor.full_tensor().detach()
        assert sum(each.shape == whole.shape and torch.equal(each, whole) for each in stacks) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_conversion_of_every_family_loads_as_its_stock_moe(family, mesh, tmp_path):
    model = converted(family)
    wanted = dense_zoo.logits(model)
    stored(model, mesh, tmp_path / "distributed")
    found = gather(tmp_path / "distributed", tmp_path / "stock")
    assert (found.form, found.why) == (FAMILIES[family].hosts[0], None)
    assert (tmp_path / "stock" / "model.safetensors").is_file()
    host = dense_zoo.load(tmp_path / "stock")
    assert host.config.model_type == found.form
    assert_same_bits(model, host)
    assert (dense_zoo.logits(host) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_host_that_routes_as_the_blocks_do_is_taken(mesh, tmp_path):
    model = converted("llama", SIGMOID)
    wanted = dense_zoo.logits(model)
    stored(model, mesh, tmp_path / "distributed")
    assert gather(tmp_path / "distributed", tmp_path / "stock").form == "glm4_moe"
    host = dense_zoo.load(tmp_path / "stock")
    bias = host.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, model.model.layers[1].mlp.router.bias)
    assert (dense_zoo.logits(host) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_bfloat16_stays_bfloat16(mesh, tmp_path):
    model = converted("qwen3").to(torch.bfloat16)
    stored(model, mesh, tmp_path / "distributed")
    gather(tmp_path / "distributed", tmp_path / "stock")
    host = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert host.dtype == torch.bfloat16
    assert_same_bits(model, host)


def test_what_no_stock_moe_computes_keeps_our_format_and_says_why(mesh, tmp_path):
    model = converted("llama", dispatch=DispatchSpec(capacity_factor=1.0))
    stored(model, mesh, tmp_path / "distributed")
    with pytest.raises(errors.HostRefuses, match=r"dispatch=.*capacity_factor=1.0.*it drops no tokens"):
        gather(tmp_path / "distributed", tmp_path / "mixtral", to="mixtral")
    assert not (tmp_path / "mixtral").exists()
    said = CliRunner().invoke(app, ["gather", str(tmp_path / "distributed"), str(tmp_path / "own")])
    assert said.exit_code == 0
    assert "moepass's own format, for moepass.load" in said.output
    assert "not a stock model: llama cannot become mixtral" in said.output
    again = moepass.load(tmp_path / "own").state_dict()
    assert all(torch.equal(again[name], t) for name, t in model.state_dict().items() if "w_" not in name)


def test_a_router_that_no_host_of_the_family_has_is_named(mesh, tmp_path):
    stored(converted("qwen3", RouterSpec(groups=2)), mesh, tmp_path / "distributed")
    with pytest.raises(errors.HostRefuses, match=r"router.groups=2 \(it has 1\)"):
        gather(tmp_path / "distributed", tmp_path / "out", to="qwen3_moe")


@pytest.mark.parametrize(("family", "expert"), [("mixtral", "experts.3.w1.weight"), ("qwen3_moe", "3.up_proj.weight")])
def test_a_stock_moe_is_written_as_save_pretrained_writes_it(family, expert, mesh, tmp_path):
    sizes = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
             "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": True}  # fmt: skip
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes))
    save_checkpoint(model, tmp_path / "distributed")
    assert gather(tmp_path / "distributed", tmp_path / "ours").form == family
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert any(name.endswith(expert) for name in ours)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = dense_zoo.load(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[name], t) for name, t in model.state_dict().items())


def test_a_model_without_a_causal_head_becomes_bare_tensors_and_says_so(mesh, tmp_path):
    model = dense_zoo.build("llama").model
    save_checkpoint(model, tmp_path / "distributed")
    found = gather(tmp_path / "distributed", tmp_path / "bare")
    assert (found.form, found.why) == ("tensors", "it is a LlamaModel, no causal language model")
    assert not (tmp_path / "bare" / "config.json").exists()
    with pytest.raises(errors.BadOption, match="converted model"):
        gather(tmp_path / "distributed", tmp_path / "other", to="mixtral")
    assert json.loads((tmp_path / "distributed" / "config.json").read_text())["architectures"] == ["LlamaModel"]
