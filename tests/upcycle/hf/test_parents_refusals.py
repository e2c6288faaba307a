"""Parents of another architecture, counts that do not fit, destinations that overlap: nothing is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from dense_zoo import add_tokenizer, build, save, saved
from safetensors.torch import load_file, save_file

from moepass import errors
from moepass.upcycle.command import upcycle_checkpoint


def refused(error, src, dst, *parts, **options):
    """The message names all ``parts``; DST was not made."""
    with pytest.raises(error) as caught:
        upcycle_checkpoint(src, dst, **options)
    text = str(caught.value)
    assert all(str(part) in text for part in parts), text
    assert not dst.exists()
    return text


@pytest.mark.parametrize(
    ("family", "change", "field", "ours", "theirs"),
    [
        ("llama", {"rms_norm_eps": 1e-4}, "rms_norm_eps", "1e-06", "0.0001"),
        ("llama", {"rope_theta": 5e5}, "rope_parameters.rope_theta", "10000.0", "500000.0"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act", "silu", "gelu"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads", "2", "4"),
        ("llama", {"vocab_size": 66}, "vocab_size", "64", "66"),
        ("llama", {"tie_word_embeddings": True}, "tie_word_embeddings", "False", "True"),
        ("mistral", {"sliding_window": 7}, "sliding_window", "5", "7"),
        ("granite", {"logits_scaling": 4.0}, "logits_scaling", "3.0", "4.0"),
        ("qwen3", {"head_dim": 8}, "head_dim", "16", "8"),
    ],
)
def test_a_config_that_is_another_function_is_refused(family, change, field, ours, theirs, tmp_path):
    src, parent = saved(family), tmp_path / "parent"
    shutil.copytree(src, parent)
    config = json.loads((parent / "config.json").read_text())
    if "rope_theta" in change:
        config["rope_parameters"] = config["rope_parameters"] | change
    else:
        config |= change
    (parent / "config.json").write_text(json.dumps(config))
    options = {"experts_from": [src, parent]}
    refused(errors.ParentDiffers, src, tmp_path / "dst", parent, f"{field} is {theirs}", ours, **options)


def test_another_family_of_the_same_shapes_is_refused(tmp_path):
    src, parent = saved("llama"), save(tmp_path / "parent", "mistral", sliding_window=None)
    refused(errors.ParentDiffers, src, tmp_path / "dst", "model_type is mistral", "llama", experts_from=[src, parent])


def test_what_is_outside_the_function_may_differ(half, tmp_path):
    parent = tmp_path / "parent"
    build("qwen3", max_position_embeddings=128, eos_token_id=5, attention_dropout=0.1, use_cache=False).save_pretrained(
        parent
    )
    report = upcycle_checkpoint(half, tmp_path / "dst", experts_from=[half, parent], dry_run=True)
    assert not report.exact


@pytest.mark.parametrize("kind", ["missing", "extra", "shape"])
def test_other_tensors_are_refused(kind, tmp_path):
    src, parent = saved("llama"), tmp_path / "parent"
    shutil.copytree(src, parent)
    tensors = load_file(parent / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        name = "model.layers.1.mlp.up_proj.bias"
        tensors[name] = torch.zeros(48)
    else:
        tensors[name] = torch.zeros(50, 32)
    save_file(tensors, parent / "model.safetensors", metadata={"format": "pt"})
    text = refused(errors.ParentDiffers, src, tmp_path / "dst", parent, name, experts_from=[src, parent])
    assert ("absent" in text) == (kind != "shape")


def test_another_vocabulary_of_the_same_size_is_refused_and_other_added_tokens_are_not(fine_tune, tmp_path):
    src, same, other = (fine_tune(saved("llama"), n, ()) for n in ("src", "same", "other"))
    for folder in (src, same, other):
        add_tokenizer(folder)
    content = json.loads((same / "tokenizer.json").read_text())
    content["added_tokens"] = [{"id": 9, "content": "<tool>", "single_word": False, "lstrip": False, "rstrip": False,
                                "normalized": False, "special": True}]  # fmt: skip
    (same / "tokenizer.json").write_text(json.dumps(content))
    assert upcycle_checkpoint(src, tmp_path / "dst", experts_from=[src, same], dry_run=True).exact
    text = (other / "tokenizer.json").read_text().replace('"w7"', '"x"').replace('"w8"', '"w7"').replace('"x"', '"w8"')
    (other / "tokenizer.json").write_text(text)
    refused(errors.ParentDiffers, src, tmp_path / "dst", other, "'w7' is 8", "7", experts_from=[src, other])


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"experts": 4}, errors.NotDivisible, ("experts=4", "the number of parents=3", "--experts 3 or a multiple")),
        ({"experts": 8, "init": "virtual-groups"}, errors.NotDivisible, ("granularity=4", "parents=3", "--experts 6")),
        ({"init": "split"}, errors.BadOption, ("split", "experts-from")),
        ({"others": "mean"}, errors.BadOption, ("others", "average, base")),
        ({"top_k": 4}, errors.TopKTooLarge, ("top_k=4", "3 experts")),
    ],
    ids=str,
)
def test_recipes_that_do_not_fit_the_parents_are_refused(options, error, parts, fine_tune, tmp_path):
    src = saved("llama")
    folders = [src, fine_tune(src, "math"), fine_tune(src, "code")]
    refused(error, src, tmp_path / "dst", *parts, experts_from=folders, **options)


def test_a_rule_for_others_without_parents_is_refused(tmp_path):
    refused(errors.BadOption, saved("llama"), tmp_path / "dst", "--experts-from", others="base")


def test_a_single_parent_gives_all_experts_and_one_expert_is_refused(fine_tune, tmp_path):
    src = saved("llama")
    math = fine_tune(src, "math")
    refused(errors.BadOption, src, tmp_path / "dst", "one expert is the dense model", experts_from=math)
    report = upcycle_checkpoint(src, tmp_path / "dst", experts_from=str(math), experts=2, dry_run=True)
    assert report.content["parents"]["expert"] == [0, 0]


@pytest.mark.parametrize("where", ["inside", "same", "around"])
def test_a_destination_that_overlaps_a_parent_is_refused(where, fine_tune, tmp_path):
    src = saved("llama")
    parent = fine_tune(src, "nest/parent")
    dst = {"inside": parent / "dst", "same": parent, "around": parent.parent}[where]
    before = sorted(tmp_path.rglob("*"))
    for resume in (False, True):
        with pytest.raises(errors.BadDestination, match="parent"):
            upcycle_checkpoint(src, dst, experts_from=[src, parent], resume=resume)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_parent_is_refused_by_name(fine_tune, tmp_path):
    src = saved("llama")
    parent = fine_tune(src, "broken")
    data = (parent / "model.safetensors").read_bytes()
    (parent / "model.safetensors").write_bytes(data[:-10])
    refused(errors.BadCheckpoint, src, tmp_path / "dst", parent, experts_from=[src, parent])
    refused(errors.BadCheckpoint, src, tmp_path / "dst", "nowhere", experts_from=[src, tmp_path / "nowhere"])


def test_a_parent_that_changes_during_the_run_stops_it(fine_tune, tmp_path):
    src = saved("llama")
    parent = fine_tune(src, "math")

    def touch(_):
        (parent / "model.safetensors").touch()

    with pytest.raises(errors.BadCheckpoint, match="changed"):
        upcycle_checkpoint(src, tmp_path / "dst", experts_from=[src, parent], progress=touch)
    assert not (tmp_path / "dst" / "config.json").exists()
