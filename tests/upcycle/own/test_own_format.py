"""``moepass.save`` and ``moepass.load``: round trips, what stock transformers says, and folders that are refused."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from blocks import Gated, Stack
from dense_zoo import build, logits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

import moepass
from moepass import errors
from moepass.nn import MoE
from moepass.spec import ExpertSpec, MoESpec, RouterSpec
from moepass.upcycle.own.load import fill_skeleton

SPEC = MoESpec(experts=ExpertSpec(num_experts=4))
FAMILIES = {
    "gpt2": {"tie_word_embeddings": True},
    "opt": {"tie_word_embeddings": False},
    "llama": {"mlp_bias": True},
    "gemma3_text": {"tie_word_embeddings": True},
    "phi3": {},
}


def converted(name, **options):
    model = build(name, **FAMILIES[name])
    moepass.convert(model, SPEC, **options)
    return model


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A saved converted GPT-2."""
    folder = tmp_path_factory.mktemp("own") / "gpt2"
    moepass.save(converted("gpt2"), folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_model_comes_back_bit_for_bit(name, tmp_path):
    model = converted(name, init="drop", layers="*.0.*")
    moepass.save(model, tmp_path / "out", max_shard_size=30_000)
    assert len(list(tmp_path.glob("out/moepass-*-of-*.safetensors"))) > 1
    loaded = moepass.load(tmp_path / "out")
    assert equal(loaded, model)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert [m.spec for m in loaded.modules() if isinstance(m, MoE)] == [
        m.spec for m in model.modules() if isinstance(m, MoE)
    ]


def test_training_goes_on_after_a_round_trip(tmp_path):
    model = converted("gpt2").train()
    ids = torch.arange(20)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    moepass.save(model, tmp_path / "a")
    loaded = moepass.load(tmp_path / "a")
    assert equal(loaded, model)
    loaded.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for m in loaded.modules() if isinstance(m, MoE) for p in m.parameters())
    moepass.save(loaded, tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_tied_weights_are_stored_once_and_tied_again(gpt2):
    stored = load_file(gpt2 / "moepass.safetensors")
    assert "lm_head.weight" not in stored
    loaded = moepass.load(gpt2)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_dtypes_are_kept_and_can_be_changed_but_frequencies_and_corrections_stay_float32(tmp_path):
    model = build("llama", dtype=torch.bfloat16, mlp_bias=True)
    moepass.convert(model, MoESpec(router=RouterSpec(bias=True, bias_update_rate=0.1)), layers="*.0.*")
    model.lm_head.float()
    moepass.save(model, tmp_path / "out")
    loaded = moepass.load(tmp_path / "out")
    assert equal(loaded, model)
    moe = loaded.model.layers[0].mlp
    assert torch.equal(moe.router.tokens_per_expert, torch.zeros(8, dtype=torch.int64))
    half = moepass.load(tmp_path / "out", dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert half.model.layers[0].mlp.router.bias.dtype == torch.float32
    assert torch.equal(half.model.rotary_emb.inv_freq, build("llama").model.rotary_emb.inv_freq)
    with pytest.raises(errors.BadOption):
        moepass.load(tmp_path / "out", dtype=torch.int8)


def test_generation_settings_and_tokenizers_live_in_the_folder(tmp_path):
    from tokenizers import Tokenizer, models

    model = converted("gpt2")
    model.generation_config.max_new_tokens = 7
    moepass.save(model, tmp_path / "out")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "out")
    assert moepass.load(tmp_path / "out").generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("b")["input_ids"] == [1]


def test_stock_transformers_refuses_the_folder_whatever_class_is_asked(gpt2):
    for cls in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="moepass"):
            cls.from_pretrained(gpt2)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        GPT2LMHeadModel.from_pretrained(gpt2)


def test_a_trained_model_may_hold_infinities(tmp_path):
    model = converted("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = float("inf")
    moepass.save(model, tmp_path / "out")
    assert equal(moepass.load(tmp_path / "out"), model)


def _manifest(change):
    def edit(folder):
        content = json.loads((folder / "moepass.json").read_text())
        change(content)
        (folder / "moepass.json").write_text(json.dumps(content))

    return edit


def _tensors(change):
    def edit(folder):
        tensors = load_file(folder / "moepass.safetensors")
        change(tensors)
        save_file(tensors, folder / "moepass.safetensors")

    return edit


W_IN = "transformer.h.0.mlp.c_fc.w_in"


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda f: (f / "moepass.json").unlink(), errors.BadMoEFolder, r"moepass\.json: there is no such file"),
        (lambda f: (f / "config.json").unlink(), errors.BadMoEFolder, r"config\.json: there is no such file"),
        (lambda f: (f / "moepass.json").write_text("{"), errors.BadMoEFolder, "it is not JSON"),
        (lambda f: (f / "moepass.json").write_text("[]"), errors.BadMoEFolder, "it is not a JSON object"),
        (lambda f: (f / "config.json").write_text("{}"), errors.BadMoEFolder, "no dense_config"),
        (
            lambda f: (f / "config.json").write_text('{"dense_config": {"model_type": "gpt9"}}'),
            errors.BadMoEFolder,
            "does not know model_type='gpt9'",
        ),
        (_manifest(lambda m: m.update(schema_version=2)), errors.BadMoEFolder, "schema_version=2.*newer moepass"),
        (_manifest(lambda m: m.pop("schema_version")), errors.BadMoEFolder, "schema_version=None"),
        (_manifest(lambda m: m["blocks"][0].pop("D")), errors.BadMoEFolder, r"blocks\.0\.D: Field required"),
        (_manifest(lambda m: m["blocks"][0].update(D=31)), errors.BadMoEFolder, r"blocks\.0\.D=31"),
        (_manifest(lambda m: m["blocks"][1].update(extra=1)), errors.BadMoEFolder, r"blocks\.1\.extra"),
        (
            _manifest(lambda m: m["blocks"][0]["spec"]["router"].update(top_k=9)),
            errors.BadMoEFolder,
            "top_k=9 exceeds the 4 experts",
        ),
        (
            _manifest(lambda m: m["blocks"][0]["spec"]["experts"].update(activation="silu(g)")),
            errors.BadMoEFolder,
            r"blocks\.0\.spec does not fit: .*activation",
        ),
        (
            _manifest(lambda m: m["blocks"][0]["spec"]["experts"].update(bias_in=False)),
            errors.BadMoEFolder,
            r"blocks\.0\.spec does not fit",
        ),
        (
            _manifest(lambda m: m["blocks"][0]["origin"]["places"][0].update(where="transformer.h.9.mlp.c_fc")),
            errors.BadMoEFolder,
            r"no dense block gives the place 'transformer\.h\.9",
        ),
        (_manifest(lambda m: m["blocks"][0]["origin"].update(places=[])), errors.BadMoEFolder, "places is empty"),
        (_manifest(lambda m: m["blocks"].pop()), errors.UnexpectedTensor, r"h\.1\.mlp\.c_fc\.weight' is missing"),
        (lambda f: (f / "moepass.safetensors").unlink(), errors.BadCheckpoint, "neither moepass.safetensors nor"),
        (_tensors(lambda t: t.pop(W_IN)), errors.UnexpectedTensor, "w_in' is missing"),
        (_tensors(lambda t: t.update({W_IN: t[W_IN][:2]})), errors.UnexpectedTensor, r"\[2, 24, 32\], not \[4, 24"),
        (_tensors(lambda t: t.update(more=torch.zeros(1))), errors.UnexpectedTensor, "'more' has no place"),
        (
            _tensors(lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})),
            errors.BadMoEFolder,
            "are one tensor in the model and differ",
        ),
    ],
)
def test_bad_folders_are_refused_with_the_file_and_the_field(gpt2, edit, error, says, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(gpt2, folder)
    edit(folder)
    with pytest.raises(error, match=says):
        moepass.load(folder)


def test_a_tensor_in_memory_of_a_dtype_without_a_code_is_refused_by_its_name(gpt2):
    tensors = load_file(gpt2 / "moepass.safetensors")
    name = "transformer.ln_f.weight"
    with pytest.raises(errors.UnexpectedTensor, match=f"{name}.*torch.complex128"):
        fill_skeleton(gpt2, tensors | {name: tensors[name].to(torch.complex128)})


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(errors.BadMoEFolder, match="no such folder"):
        moepass.load(tmp_path / "nowhere")


def _resized(model):
    model.resize_token_embeddings(70)
    model.config.vocab_size = 64


def _foreign_moe(model):
    model.transformer.h[0].mlp.c_fc.origin = None


def _rerouted(model):
    moe = model.transformer.h[0].mlp.c_fc
    moe.w_in = nn.Parameter(moe.w_in[:, :1].detach())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_resized, "70"),
        (_foreign_moe, "moepass.convert did not make this block"),
        (_rerouted, "w_in has the shape"),
        (lambda m: m.to("meta"), "meta device"),
        (lambda m: torch.compile(m), "model._orig_mod"),
        (lambda m: m.transformer, "AutoModelForCausalLM gives GPT2LMHeadModel"),
        (lambda _: build("gpt2"), "no MoE block"),
    ],
)
def test_models_that_could_not_be_loaded_again_are_not_saved(change, says, tmp_path):
    model = converted("gpt2")
    changed = change(model)
    model = model if changed is None else changed
    with pytest.raises(errors.CannotSave, match=says):
        moepass.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_of_transformers_is_not_saved(tmp_path):
    model = Stack(Gated())
    moepass.convert(model)
    with pytest.raises(errors.CannotSave, match="no model of transformers"):
        moepass.save(model, tmp_path / "out")


def test_a_folder_that_is_in_use_is_not_written_to(gpt2):
    before = {path.name: path.read_bytes() for path in gpt2.iterdir()}
    with pytest.raises(errors.BadDestination, match="not empty"):
        moepass.save(copy.deepcopy(converted("gpt2")), gpt2)
    assert before == {path.name: path.read_bytes() for path in gpt2.iterdir()}


def test_nothing_is_pickled(gpt2):
    assert {path.suffix for path in gpt2.iterdir()} == {".json", ".safetensors"}
