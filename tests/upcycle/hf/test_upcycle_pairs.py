"""Every whitelisted (dense, host) pair: stock transformers loads the output, and it is the dense function."""

from __future__ import annotations

import pytest
import torch
from dense_zoo import S, V, error, load, save, saved

from moepass.upcycle.command import upcycle_checkpoint
from moepass.upcycle.hf.families import FAMILIES

#: transformers says this of a shared expert of width 0.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

TOLERANCE = 5e-6
PAIRS = [(family.model_type, host) for family in FAMILIES.values() for host in family.hosts]
#: Settings without which the host refuses the tiny model.
NEEDS = {
    ("seed_oss", "mixtral"): {"attention_bias": False},
    ("mistral", "granitemoe"): {"sliding_window": None},
    ("mistral", "qwen2_moe"): {"sliding_window": None},
    ("mistral", "glm4_moe"): {"sliding_window": None},
}
VIRTUAL = {"init": "virtual-groups", "granularity": 2, "top_k": 2}


def ids(pair):
    return f"{pair[0]}-{pair[1]}"


@pytest.mark.parametrize("pair", PAIRS, ids=ids)
@pytest.mark.parametrize(("recipe", "tied"), [({}, True), (VIRTUAL, False)], ids=["copy-tied", "groups-untied"])
def test_stock_transformers_computes_the_dense_function(pair, recipe, tied, tmp_path):
    src = saved(pair[0], tie_word_embeddings=tied, **NEEDS.get(pair, {}))
    report = upcycle_checkpoint(src, tmp_path / "dst", to=pair[1], experts=4, **recipe)
    assert report.exact
    assert error(src, tmp_path / "dst") <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("recipe", "tied"), [({}, False), (VIRTUAL, True)], ids=["copy-untied", "groups-tied"])
def test_the_default_host_of_each_family_computes_it_with_the_other_embeddings_too(family, recipe, tied, tmp_path):
    src = saved(family, tie_word_embeddings=tied)
    upcycle_checkpoint(src, tmp_path / "dst", experts=4, **recipe)
    assert error(src, tmp_path / "dst") <= TOLERANCE


def rope(kind, **values):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0], "partial_rotary_factor": 1.0}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FEATURES = [
    ("mistral", "mixtral", {"sliding_window": 5}),
    ("phi3", "mixtral", {"sliding_window": 5}),
    ("qwen2", "qwen2_moe", WINDOWS),
    ("qwen3", "mellum", WINDOWS),
    ("llama", "granitemoe", {"attention_bias": True}),
    ("qwen3", "qwen3_moe", {"attention_bias": True}),
    ("olmo2", "flex_olmo", {"attention_bias": True}),
    ("granite", "granitemoe", {"attention_bias": True}),
    ("cohere2", "cohere2_moe", {"attention_bias": True}),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", {"attention_bias": True, **rope("dynamic", alpha=1000.0, factor=1.0)}),
    ("llama", "mixtral", {"head_dim": 16}),
    ("llama", "mixtral", {"hidden_act": "gelu"}),
    ("llama", "mixtral", LLAMA3),
    ("llama", "mixtral", {"max_position_embeddings": 16, **rope("dynamic", factor=2.0)}),
    ("qwen2", "qwen2_moe", YARN),
    ("qwen3", "mellum", YARN),
    ("cohere2", "cohere2_moe", YARN),
    ("phi3", "glm4_moe", rope("default", partial_rotary_factor=0.5)),
    ("phi3", "mixtral", {"original_max_position_embeddings": 16, **rope("longrope", **LONG)}),
]


@pytest.mark.parametrize(("dense", "host", "config"), FEATURES, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_what_a_host_supports_it_computes(dense, host, config, tmp_path):
    src = save(tmp_path / "src", dense, **config)
    upcycle_checkpoint(src, tmp_path / "dst", to=host, experts=4)
    assert error(src, tmp_path / "dst") <= TOLERANCE


MIXED = [
    ("qwen2", "qwen2_moe", "[13]"),
    ("qwen3", "qwen3_moe", "[13]"),
    ("qwen3", "mellum", "[13]"),
    ("qwen3", "glm4_moe", "[23]"),
    ("phi3", "glm4_moe", "[23]"),
    ("ernie4_5", "ernie4_5_moe", "[12]"),
    ("cohere2", "cohere2_moe", "[12]"),
]


@pytest.mark.parametrize(("dense", "host", "layers"), MIXED, ids=lambda v: v)
def test_layers_that_are_not_chosen_stay_dense(dense, host, layers, tmp_path):
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if dense == "cohere2" else {}
    src = save(tmp_path / "src", dense, num_hidden_layers=4, **kinds)
    report = upcycle_checkpoint(src, tmp_path / "dst", to=host, experts=4, layers=f"model.layers.{layers}.*")
    converted = {name.split(".")[2] for name in report.content["tensors"] if ".experts." in name}
    assert converted == set(layers) & set("0123")
    assert error(src, tmp_path / "dst") <= TOLERANCE


@pytest.mark.parametrize("host", ["qwen3_moe", "glm4_moe"])
def test_a_split_that_uses_all_experts_is_exact(host, tmp_path):
    src = saved("qwen3")
    upcycle_checkpoint(src, tmp_path / "dst", to=host, init="split", experts=4, top_k=4)
    assert error(src, tmp_path / "dst") <= TOLERANCE


APPROXIMATE = [{"init": "noise"}, {"init": "drop"}, {"init": "split"}, {"renormalize": False}]


@pytest.mark.parametrize("options", APPROXIMATE, ids=lambda o: "-".join(map(str, o.values())))
def test_what_is_called_approximate_is_not_exact(options, tmp_path):
    src = saved("qwen3")
    report = upcycle_checkpoint(src, tmp_path / "dst", experts=4, **options)
    assert not report.exact
    assert 1e-4 < error(src, tmp_path / "dst") < 3


def test_narrow_copies_keep_every_byte_and_the_function(tmp_path):
    src = save(tmp_path / "src", "ernie4_5", dtype=torch.bfloat16)
    report = upcycle_checkpoint(src, tmp_path / "dst", experts=4)
    assert report.exact
    assert report.written.computed < report.written.copied / 50, "only the router is new"
    assert error(src, tmp_path / "dst") <= TOLERANCE


@pytest.mark.parametrize(
    ("options", "exact"),
    [({"dtype": "bfloat16"}, False), ({"init": "virtual-groups"}, True),
     ({"init": "virtual-groups", "granularity": 3, "experts": 6, "top_k": 3}, True)],
)  # fmt: skip
def test_rounding_takes_the_verdict_away(options, exact, tmp_path):
    src = saved("llama")
    report = upcycle_checkpoint(src, tmp_path / "dst", **{"experts": 4, **options})
    assert report.exact is exact
    assert (error(src, tmp_path / "dst") <= TOLERANCE) is exact


def _backward(folder):
    model = load(folder)
    ids = torch.randint(V, (2, S), generator=torch.Generator().manual_seed(3))
    model(ids, labels=ids, use_cache=False).loss.backward()
    return dict(model.named_parameters())


@pytest.mark.parametrize(("dense", "host"), [("qwen3", "qwen3_moe"), ("llama", "mixtral"), ("qwen3", "glm4_moe")])
@pytest.mark.parametrize("recipe", [{}, VIRTUAL], ids=["copy", "groups"])
def test_gradients_are_those_of_the_dense_model(dense, host, recipe, tmp_path):
    """Outside the experts they are equal; those of all experts add up to the dense block's."""
    src = saved(dense)
    upcycle_checkpoint(src, tmp_path / "dst", to=host, experts=4, **recipe)
    before, after = _backward(src), _backward(tmp_path / "dst")
    for name, p in before.items():
        if ".mlp." not in name:
            torch.testing.assert_close(after[name].grad, p.grad, rtol=1e-3, atol=1e-6, msg=name)
    G = recipe.get("granularity", 1)
    for i in range(2):
        block = f"model.layers.{i}.mlp."
        fused = after[f"{block}experts.gate_up_proj"].grad
        shards = fused.reshape(4 // G, G, 2, 48 // G, 32).sum(0)  # copies, shards, projections, rows, D
        for p, name in enumerate(("gate_proj", "up_proj")):
            expected = before[f"{block}{name}.weight"].grad
            torch.testing.assert_close(shards[:, p].reshape(48, 32), expected, rtol=1e-3, atol=1e-6)
        router = after[f"{block}gate.weight"].grad
        assert (float(router.abs().max()) > 1e-4) is (G > 1), "copies give the router nothing to learn from yet"
        assert (fused.flatten(1).abs().amax(1) > 0).all(), "every expert gets a gradient"
