"""``moepass upcycle --to moepass``: models without a stock host, streamed; the weights are those of ``convert``."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from dense_zoo import build, dense_logits, logits, save, saved
from safetensors.torch import load_file, save_file

import moepass
from moepass import errors
from moepass.spec import ExpertSpec, MoESpec, RouterSpec
from moepass.upcycle.command import upcycle_checkpoint
from moepass.upcycle.hf.recipe import METHODS

FAMILIES = {"gpt2": {}, "opt": {}, "gemma3_text": {"tie_word_embeddings": True}, "llama": {"mlp_bias": True}}


def state_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def spec(experts=4, top_k=2):
    return MoESpec(router=RouterSpec(top_k=top_k), experts=ExpertSpec(num_experts=experts))


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, method) for name in ("gpt2", "gemma3_text") for method in METHODS), ("opt", "drop"), ("llama", "drop")],
)
def test_convert_the_command_and_the_load_hook_make_the_same_weights(name, method, tmp_path):
    src = saved(name, **FAMILIES[name])
    report = upcycle_checkpoint(src, tmp_path / "dst", to="moepass", init=method, experts=4, seed=3)
    loaded = moepass.load(tmp_path / "dst")

    dense = build(name, **FAMILIES[name])
    converted, hooked = copy.deepcopy(dense), copy.deepcopy(dense).to("meta")
    found = moepass.convert(converted, spec(), init=METHODS[method], seed=3)
    moepass.convert(hooked, spec(), init=METHODS[method], seed=3)
    with moepass.accept_dense(hooked):
        hooked.load_state_dict(dense.state_dict(), assign=True)

    assert state_equal(loaded, converted)
    assert state_equal(hooked, converted)
    assert report.exact == found.exact == (method in {"copy", "virtual-groups"})
    origins = [m.origin for model in (loaded, converted) for m in model.modules() if isinstance(m, moepass.nn.MoE)]
    assert origins[: len(origins) // 2] == origins[len(origins) // 2 :]


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "virtual-groups") for name in (*FAMILIES, "phi")] + [("gpt2", "copy"), ("llama", "copy")],
)
def test_exact_recipes_keep_the_function_and_verify_says_so(name, method, tmp_path):
    src = saved(name, **FAMILIES.get(name, {}))
    report = upcycle_checkpoint(src, tmp_path / "dst", to="moepass", init=method, experts=4, verify=True)
    assert report.exact
    assert report.verified.passed
    assert len(report.verified.comparisons[0].layers) == 2
    expected = dense_logits(src)
    assert (logits(moepass.load(tmp_path / "dst")) - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_verify_sees_a_changed_weight(tmp_path):
    src = saved("gpt2")
    upcycle_checkpoint(src, tmp_path / "dst", to="moepass", experts=4)
    tensors = load_file(tmp_path / "dst" / "moepass.safetensors")
    tensors["transformer.h.1.mlp.c_fc.w_out"] *= 1.1
    save_file(tensors, tmp_path / "dst" / "moepass.safetensors")
    from moepass.upcycle.checkpoint.verify import verify

    report = verify(src, tmp_path / "dst")
    assert not report.passed
    assert report.first_bad_layer == "transformer.h.1"


def test_the_folder_says_what_it_is_and_a_dry_run_says_the_same(tmp_path):
    src = saved("gpt2")
    dry = upcycle_checkpoint(src, tmp_path / "dst", to="moepass", experts=4, dry_run=True)
    assert not (tmp_path / "dst").exists()
    done = upcycle_checkpoint(src, tmp_path / "dst", to="moepass", experts=4, max_shard_size="40KB")
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["model_type"] == "moepass"
    assert config["dense_config"] == json.loads((src / "config.json").read_text())
    content = json.loads((tmp_path / "dst" / "moepass_upcycle.json").read_text())
    assert (content["to"], content["verdict"]["exact"]) == ("moepass", True)
    assert content["tensors"]["transformer.h.0.mlp.c_fc.w_in"]["from"] == ["transformer.h.0.mlp.c_fc.weight"]
    assert "moepass.load" in (tmp_path / "dst" / "README.md").read_text()
    assert (tmp_path / "dst" / "moepass.safetensors.index.json").is_file()
    parameters = sum(p.numel() for p in moepass.load(tmp_path / "dst").parameters())
    assert dry.sizes.parameters == done.sizes.parameters == parameters
    assert done.sizes.nbytes == done.written.nbytes


def test_active_parameters_and_flops_are_those_of_the_modules(tmp_path):
    sizes = upcycle_checkpoint(saved("opt"), tmp_path, to="moepass", experts=4, dry_run=True).sizes
    model = build("opt")
    moepass.convert(model, spec(), init="copy")
    counts = [m.counts() for m in model.modules() if isinstance(m, moepass.nn.MoE)]
    idle = sum(c.num_params - c.num_active_params for c in counts)
    assert sizes.active_parameters == sum(p.numel() for p in model.parameters()) - idle
    dense = build("opt")
    matrices = sum(p.numel() for n, p in dense.named_parameters() if p.dim() == 2 and "embed_positions" not in n)
    assert sizes.dense_flops_per_token == 2 * matrices, "the embedding is also the output projection"
    D, F, layers = dense.config.hidden_size, dense.config.ffn_dim, dense.config.num_hidden_layers
    more = layers * (2 * D * F + 4 * D)  # a second expert, and the router; biases are no products
    assert sizes.flops_per_token == 2 * (matrices + more)


def test_the_error_of_a_block_that_gives_zeros_is_a_number(tmp_path):
    model = build("gpt2")
    with torch.no_grad():
        for parameter in model.transformer.h[0].mlp.c_proj.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "src")
    report = upcycle_checkpoint(tmp_path / "src", tmp_path / "dst", to="moepass", init="drop", experts=4, dry_run=True)
    assert report.facts.measured.error == 0.0


def test_layers_dtype_and_router_options_are_followed(tmp_path):
    src, options = saved("opt"), {"to": "moepass", "experts": 4}
    report = upcycle_checkpoint(src, tmp_path / "a", layers="*.layers.1*", dtype="bfloat16", **options)
    model = moepass.load(tmp_path / "a")
    assert [isinstance(layer.fc1, moepass.nn.MoE) for layer in model.model.decoder.layers] == [False, True]
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16}
    assert not report.exact
    assert "rounded from F32 to BF16" in report.facts.reason
    upcycle_checkpoint(src, tmp_path / "b", router="normal", router_std=1.0, renormalize=False, **options)
    router = moepass.load(tmp_path / "b").model.decoder.layers[0].fc1.router
    assert router.spec.normalize is None
    assert 0.5 < router.weight.norm(dim=1).mean() < 2


def test_an_interrupted_run_is_continued_to_the_same_bytes(tmp_path):
    src, options = saved("gpt2"), {"to": "moepass", "experts": 4, "init": "drop", "max_shard_size": "40KB"}
    upcycle_checkpoint(src, tmp_path / "a", **options)

    class Stopped(Exception):
        pass

    def stop(step):
        if step.step == "shard":
            raise Stopped

    with pytest.raises(Stopped):
        upcycle_checkpoint(src, tmp_path / "b", workers=1, progress=stop, **options)
    with pytest.raises(errors.BadMoEFolder):
        moepass.load(tmp_path / "b")
    report = upcycle_checkpoint(src, tmp_path / "b", resume=True, **options)
    assert report.written.skipped
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in files)


def test_a_checkpoint_without_the_base_models_prefix_is_understood(tmp_path):
    """As the GPT-2 of the Hub, which also holds causal masks that the class ignores."""
    src = save(tmp_path / "src", "gpt2")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(src / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    report = upcycle_checkpoint(src, tmp_path / "dst", to="moepass", experts=4, verify=True)
    assert report.verified.passed
    model = build("gpt2")
    moepass.convert(model, spec(), init="copy")
    assert state_equal(moepass.load(tmp_path / "dst"), model)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"layers": "model.*"}, errors.BadOption, r"selects none of transformer\.h\.0\.mlp to transformer\.h\.1\.mlp"),
        ({"init": "virtual-groups", "granularity": 5, "experts": 10, "top_k": 5}, errors.NotDivisible, "h.0.mlp"),
        ({"top_k": 9}, errors.TopKTooLarge, "top_k=9"),
        ({"top_k": 1}, errors.BadOption, "could never learn"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(options, error, says, tmp_path):
    with pytest.raises(error, match=says):
        upcycle_checkpoint(saved("gpt2"), tmp_path / "dst", to="moepass", **options)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("transformer.ln_f.weight"), "ln_f.weight' is missing"),
        (lambda t: t.update({"transformer.h.7.ln_1.weight": torch.zeros(32)}), "has no place in GPT2LMHeadModel"),
        (lambda t: t.update({"transformer.ln_f.weight": torch.zeros(31)}), r"shape \[31\], not \[32\]"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(change, says, tmp_path):
    src = save(tmp_path / "src", "gpt2")
    tensors = load_file(src / "model.safetensors")
    change(tensors)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.UnexpectedTensor, match=says):
        upcycle_checkpoint(src, tmp_path / "dst", to="moepass")


def test_a_model_that_is_moe_already_and_an_unknown_one_are_refused(tmp_path):
    src = tmp_path / "src"
    upcycle_checkpoint(saved("llama"), src, experts=4)
    with pytest.raises(errors.NoHost, match="mixture of experts already"):
        upcycle_checkpoint(src, tmp_path / "dst", to="moepass")
    config = json.loads((src / "config.json").read_text()) | {"model_type": "nobody"}
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.BadCheckpoint, match="does not know model_type='nobody'"):
        upcycle_checkpoint(src, tmp_path / "dst", to="moepass")


def test_families_without_a_host_are_pointed_to_the_format(tmp_path):
    with pytest.raises(errors.NoHost, match="--to moepass"):
        upcycle_checkpoint(saved("gpt2"), tmp_path / "dst")
