"""Comparing checkpoints layer by layer: the stock forward of every host, and differences that are found and blamed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moepass.errors import BadOption, NotVerifiable
from moepass.upcycle.checkpoint.routing import broken_groups, virtual_groups
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.stock import Stock
from moepass.upcycle.checkpoint.tensors import Computed, OutTensor, Verbatim
from moepass.upcycle.checkpoint.verify import verify
from moepass.upcycle.checkpoint.writer import write

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 0}
ROUTED |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 0}
DENSE = {
    "llama": {},
    "mistral": {},
    "phi3": {"head_dim": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "olmo2": {},
    "granite": {},
    "ernie4_5": {},
    "cohere2": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "qwen3_5_text": LINEAR,
    "internlm3": {},
}
MOE = {
    "mixtral": LOCAL,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS | {"tie_word_embeddings": True},
    "mellum": EXPERTS,
    "flex_olmo": EXPERTS,
    "granitemoe": LOCAL,
    "granitemoeshared": LOCAL | {"shared_intermediate_size": 16},
    "ernie4_5_moe": ERNIE | {"moe_intermediate_size": 16},
    "cohere2_moe": EXPERTS | {"mlp_layer_types": ["sparse"] * 2},
    "hunyuan_v1_moe": EXPERTS | {"moe_topk": 2},
    "glm4_moe": ROUTED,
    "dots1": ROUTED,
    "qwen3_5_moe_text": EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16},
    "lfm2_moe": EXPERTS | {"num_dense_layers": 0, "layer_types": ["conv", "full_attention"]},
    "olmoe": EXPERTS,
}


def save(folder, model_type: str, **fields):
    """A model with weights that are large enough for every path to matter, as ``save_pretrained`` writes it."""
    config = AutoConfig.for_model(model_type, **{k: v for k, v in (COMMON | fields).items() if v is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        p.data.normal_(0, 0.2) if p.dim() > 1 else p.data.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


IDS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", [*DENSE, *MOE])
def test_the_logits_are_those_of_from_pretrained_and_one_layer_is_in_memory(model_type, tmp_path):
    save(tmp_path, model_type, **(DENSE | MOE)[model_type])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    hidden, stock = [], Stock.open(tmp_path)
    got = stock.run(IDS, lambda name, _, h: hidden.append((name, h)))
    with torch.no_grad():
        expected = whole(input_ids=IDS, output_hidden_states=True)
    assert (got - expected.logits).abs().max() <= 5e-6 * expected.logits.abs().max()
    assert torch.allclose(hidden[0][1], expected.hidden_states[1], atol=1e-5)
    assert [name for name, _ in hidden] == ["model.layers.0", "model.layers.1"]
    layer = sum(p.nbytes for p in max((whole.get_decoder().layers), key=_size).parameters())
    assert layer <= stock.peak < sum(p.nbytes for p in whole.parameters()) * 0.55
    assert all(p.is_meta for p in stock.model.parameters())


def _size(module) -> int:
    return sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize("model_type", list(MOE))
def test_every_host_reports_its_routing(model_type, tmp_path):
    save(tmp_path, model_type, **MOE[model_type])
    report = verify(tmp_path, tmp_path)
    (comparison,) = report.comparisons
    assert report.passed
    assert comparison.logits.largest == comparison.kl_max == 0.0
    assert [r.layer for r in comparison.routers] == ["model.layers.0", "model.layers.1"]
    for router in comparison.routers:
        assert len(router.tokens_per_expert) == 4
        assert sum(router.tokens_per_expert) == 64 * 2
        assert router.imbalance == pytest.approx(max(router.tokens_per_expert) / 32)
        assert 0 < router.entropy <= 1
        assert router.group_size is None


@pytest.fixture
def llama(tmp_path):
    return save(tmp_path / "llama", "llama")


def virtual(source: Source, router_std: float = 0.1) -> list[OutTensor]:
    """Llama as Mixtral with 8 experts of half width: two shards, four copies of each, top-2, down projection x 2."""
    out = []
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for name, h in source.headers.items():
        prefix, _, rest = name.partition(".mlp.")
        if not rest:
            out.append(OutTensor(name, h.shape, h.dtype, Verbatim(name)))
            continue
        short = next(k for k, v in names.items() if rest.startswith(v))
        for e in range(8):
            recipe = Computed((name,), lambda x, e=e, down=short == "w2": _part(x, e % 2, down), f"part {e % 2}")
            shape = (h.shape[0], h.shape[1] // 2) if short == "w2" else (h.shape[0] // 2, h.shape[1])
            new = f"{prefix}.block_sparse_moe.experts.{e}.{short}.weight"
            out.append(OutTensor(new, shape, h.dtype, recipe, group=name))
        if short == "w2":
            rows = (router_std * torch.randn(4, 32, generator=torch.Generator().manual_seed(2))).repeat_interleave(2, 0)
            gate = Computed((), lambda rows=rows: rows, "router")
            out.append(OutTensor(f"{prefix}.block_sparse_moe.gate.weight", (8, 32), "F32", gate))
    return out


def _part(x, i, down):
    return (2 * x.chunk(2, 1)[i]).contiguous() if down else x.chunk(2, 0)[i].clone()


def mixtral_config(source: Source) -> dict[str, bytes]:
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    kept += ("rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings")
    fields = {k: source.config[k] for k in kept} | {"intermediate_size": 32, "num_local_experts": 8}
    fields |= {"num_experts_per_tok": 2, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    return {"config.json": json.dumps(fields | {"dtype": "float32", "sliding_window": None}).encode()}


@pytest.fixture
def mixtral(llama, tmp_path):
    source = Source.open(llama)
    write(tmp_path / "mixtral", virtual(source), source, mixtral_config(source), max_shard_size=40_000)
    return tmp_path / "mixtral"


def test_virtual_groups_written_by_the_writer_load_in_stock_transformers_and_are_exact(llama, mixtral):
    a, b = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (llama, mixtral))
    with torch.no_grad():
        x, y = a(input_ids=IDS).logits, b(input_ids=IDS).logits
    assert (x - y).abs().max() <= 5e-6 * x.abs().max()
    report = verify(llama, mixtral, token_ids=IDS)
    given = report.comparisons[1]
    assert report.passed
    assert report.first_bad_layer is None
    assert (given.tokens, given.shape, given.argmax) == ("given", (2, 16), 1.0)
    assert given.logits.largest == pytest.approx(float((x - y).abs().max()), rel=0.5)
    assert given.logits.scale == pytest.approx(float(x.abs().max()))
    assert [r.group_size for r in given.routers] == [2, 2]
    assert all(r.broken_float32 == r.broken_bfloat16 == 0 for r in given.routers)


def test_groups_that_tie_in_bfloat16_are_counted(llama, tmp_path):
    """Two groups whose rows differ by less than bfloat16 can tell."""
    source = Source.open(llama)
    tensors = virtual(source)
    row = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    near = torch.cat([row * (1 + 1e-4 * i) for i in (0, 0, 1, 1, 2, 2, 3, 3)])
    for i, t in enumerate(tensors):
        if t.name.endswith("gate.weight"):
            tensors[i] = OutTensor(t.name, t.shape, t.dtype, Computed((), lambda: near, "near"))
    write(tmp_path / "near", tensors, source, mixtral_config(source))
    report = verify(llama, tmp_path / "near")
    for router in report.comparisons[0].routers:
        assert router.group_size == 2
        assert router.broken_float32 == 0
        assert router.broken_bfloat16 > 16
    assert report.passed


@pytest.mark.parametrize(
    ("index", "broken"),
    [([[0, 1], [2, 3]], 0), ([[0, 2]], 1), ([[1, 0], [1, 2], [3, 0]], 2), ([[0, 1, 2, 3]], 0), ([[0, 1, 2]], 1)],
)
def test_a_token_breaks_a_group_when_it_takes_a_part_of_it(index, broken):
    groups = virtual_groups(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))
    assert groups is not None
    assert broken_groups(torch.tensor(index), groups) == broken


@pytest.mark.parametrize("rows", [[[1.0], [2], [3], [4]], [[1.0], [1], [1], [1]], [[1.0], [1], [1], [2]]])
def test_different_equal_or_uneven_rows_are_no_virtual_groups(rows):
    assert virtual_groups(torch.tensor(rows)) is None


def _one_expert(tensors):
    tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"] *= 1.001


def test_a_wrong_expert_fails_and_its_layer_is_blamed(tmp_path):
    save(tmp_path / "a", "mixtral", **LOCAL)
    save(tmp_path / "b", "mixtral", **LOCAL)
    assert verify(tmp_path / "a", tmp_path / "b").passed
    change(tmp_path / "b", _one_expert)
    report = verify(tmp_path / "a", tmp_path / "b")
    assert not report.passed
    assert report.first_bad_layer == "model.layers.1"
    assert report.comparisons[0].layers[0].largest == 0.0
    assert report.comparisons[0].kl_mean > 0
    assert verify(tmp_path / "a", tmp_path / "b", tolerance=0.1).passed


def test_the_kullback_leibler_divergence_is_torchs(tmp_path):
    save(tmp_path / "a", "llama")
    save(tmp_path / "b", "llama")
    change(tmp_path / "b", lambda t: t["lm_head.weight"].mul_(1.01))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / f, dtype=torch.float32).eval() for f in "ab"]
    with torch.no_grad():
        p, q = (m(input_ids=IDS).logits.double().log_softmax(-1) for m in models)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    found = verify(tmp_path / "a", tmp_path / "b", token_ids=IDS).comparisons[1]
    assert found.kl_mean == pytest.approx(float(expected.mean()), rel=1e-3)
    assert found.kl_max == pytest.approx(float(expected.max()), rel=1e-3)


def test_not_a_number_never_passes(llama, tmp_path):
    save(tmp_path / "b", "llama")
    change(tmp_path / "b", lambda t: t["model.norm.weight"].fill_(math.nan))
    assert not verify(llama, tmp_path / "b").passed


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    save(tmp_path, "mixtral", **LOCAL)
    change(tmp_path, lambda t: t.pop("model.layers.1.input_layernorm.weight"))
    with pytest.raises(NotVerifiable, match=r"model.layers.1.input_layernorm.weight"):
        verify(tmp_path, tmp_path)


def test_a_missing_expert_is_refused(tmp_path):
    save(tmp_path, "mixtral", **LOCAL)
    change(tmp_path, lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight"))
    with pytest.raises(NotVerifiable):
        verify(tmp_path, tmp_path)


def test_a_tensor_without_a_place_is_refused_by_name(llama):
    change(llama, lambda t: t.update({"model.layers.0.mlp.extra.weight": torch.ones(2)}))
    with pytest.raises(NotVerifiable, match=r"model.layers.0.mlp.extra.weight"):
        verify(llama, llama)


def test_a_tensor_of_another_shape_is_refused(llama):
    change(llama, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(NotVerifiable, match=r"model.norm.weight"):
        verify(llama, llama)


def test_an_lm_head_that_alone_is_on_disk_serves_the_tied_embeddings(tmp_path):
    save(tmp_path, "llama", tie_word_embeddings=True)
    change(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
    assert torch.equal(Stock.open(tmp_path).run(IDS, lambda *_: None), expected)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 3}, {"vocab_size": 98}, {"hidden_size": 16}])
def test_models_that_cannot_be_equal_are_refused(llama, tmp_path, fields):
    save(tmp_path / "b", "llama", **fields)
    with pytest.raises(NotVerifiable, match="the source has"):
        verify(llama, tmp_path / "b")


@pytest.mark.parametrize("ids", [[97], [-1], [0.5], [], [[1, 2], [3]], [[[1]]], "text", [True]])
def test_token_ids_that_are_no_ids_are_refused(llama, ids):
    with pytest.raises(BadOption, match="token_ids"):
        verify(llama, llama, token_ids=ids)


@pytest.mark.parametrize("field", [{"model_type": "llamoid"}, {"hidden_size": "wide"}, {"num_attention_heads": 0}])
def test_a_config_that_transformers_cannot_build_is_refused(llama, field):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | field))
    with pytest.raises(NotVerifiable, match=r"config\.json"):
        verify(llama, llama)


def test_the_report_reads_as_text_and_as_json(llama, mixtral):
    report = verify(llama, mixtral)
    text, content = str(report), json.loads(report.to_json())
    assert "is the same function as" in text
    assert "groups of 2 broken: 0 (float32), 0 (bfloat16)" in text
    assert content["passed"] is True
    assert content["comparisons"][0]["logits"]["relative"] <= 5e-6
    assert content["peak_weights"] == report.peak_weights
