"""Where calibration tokens come from, how many count, and that the bytes depend on nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from dense_zoo import V, save, saved
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moepass import errors
from moepass.upcycle.command import upcycle_checkpoint
from moepass.upcycle.hf import calibration as module
from moepass.upcycle.hf.calibration import calibration
from moepass.upcycle.hf.match import resolve

IDS = torch.randint(V, (3, 40), generator=torch.Generator().manual_seed(4)).tolist()
WORDS = [f"w{i}" for i in range(V)]


def config(**fields):
    return resolve({"model_type": "llama", "vocab_size": V, "max_position_embeddings": 64, **fields})


@pytest.fixture
def with_tokenizer(tmp_path):
    src = save(tmp_path / "src", "qwen3")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(src)
    return src


def test_a_text_and_its_ids_are_the_same_calibration(with_tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(WORDS[i] for i in IDS[0]))
    by_text = calibration(with_tokenizer, config(), tmp_path / "text.txt")
    by_ids = calibration(with_tokenizer, config(), ids=IDS[0])
    assert torch.equal(by_text.ids, by_ids.ids)
    assert by_text.to_dict()["sha256"] == by_ids.to_dict()["sha256"]
    for name, options in (("a", {"calibration": tmp_path / "text.txt"}), ("b", {"calibration_tokens": IDS[0]})):
        options |= {"init": "cluster", "cluster_on": "activations", "experts": 4}
        upcycle_checkpoint(with_tokenizer, tmp_path / name, **options)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize("form", ["text", "file", "lists", "tuple"])
def test_ids_are_taken_in_every_form(form, tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps([[1, 2, 3]]))
    given = {"text": "1,2,3", "file": str(tmp_path / "ids.json"), "lists": [[1, 2, 3]], "tuple": (1, 2, 3)}[form]
    assert calibration(tmp_path, config(), ids=given).ids.tolist() == [[1, 2, 3]]


def test_rows_are_cut_padded_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOKENS", 10)
    made = calibration(tmp_path, config(max_position_embeddings=4), ids=[[1] * 6, [2], [3] * 9])
    assert made.ids.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [2, 0, 0, 0], [3, 3, 3, 0]]
    assert made.tokens == 10
    assert torch.equal(made.mask, made.ids > 0)


def test_padding_is_not_observed(tmp_path):
    """Rows of different lengths give what the same rows give one by one, up to the order of sums."""
    src, seen = saved("qwen3"), []
    rows = [IDS[0], IDS[1][:7]]
    for ids in (rows, *([row] for row in rows)):
        given = calibration(src, resolve(json.loads((src / "config.json").read_text())), ids=ids)
        module.observed(src, given, [1], lambda layer, block: seen.append(block.a_TF))
    torch.testing.assert_close(seen[0], torch.cat(seen[1:]), rtol=1e-4, atol=1e-5)


def test_only_the_layers_that_matter_are_run(monkeypatch):
    src, layers, real = saved("qwen3"), [], module.observe
    given = calibration(src, resolve(json.loads((src / "config.json").read_text())), ids=IDS)

    def counted(folder, ids, see):
        def keep(layer, *seen):
            layers.append(layer)
            see(layer, *seen)

        real(folder, ids, keep)

    monkeypatch.setattr(module, "observe", counted)
    module.observed(src, given, [0], lambda *_: None)
    assert layers == [0]


REFUSED = [
    ({"text": "missing.txt"}, "cannot be read"),
    ({"text": "latin1.txt"}, "cannot be read"),
    ({"text": "empty.txt"}, "no tokens"),
    ({"text": "text.txt"}, "no tokenizer.*--calibration-tokens"),
    ({"text": "text.txt", "ids": "1"}, "not both"),
    ({"ids": "1,x"}, "1,15043"),
    ({"ids": "missing.json"}, "1,15043"),
    ({"ids": "broken.json"}, "1,15043"),
    ({"ids": [[1], 2]}, "1,15043"),
    ({"ids": [1.5]}, "1,15043"),
    ({"ids": 7}, "1,15043"),
    ({"ids": [[], []]}, "no tokens"),
    ({"ids": [1, V]}, f"{V} is outside the vocabulary, which is 0 to {V - 1}"),
    ({"ids": [-1]}, "-1 is outside the vocabulary"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # their tokenizer classes do without files in two ways
def test_what_is_no_calibration_is_refused(given, says, family, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "broken.json").write_text("[[1,")
    given = {key: tmp_path / v if isinstance(v, str) and "." in v else v for key, v in given.items()}
    with pytest.raises(errors.BadOption, match=says) as refusal:
        calibration(saved(family), config(), **given)
    assert "\n" not in str(refusal.value)


def test_the_text_decides_the_bytes_and_threads_do_not(tmp_path):
    options = {"init": "cluster", "cluster_on": "activations", "shared": 8, "router": "centroids", "experts": 4}
    for name, ids, threads in (("a", IDS, 1), ("b", IDS, 2), ("c", IDS[:1], 1)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        upcycle_checkpoint(saved("qwen2"), tmp_path / name, calibration_tokens=ids, **options)
        assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
    for file in ("model.safetensors", "moepass_upcycle.json", "README.md"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b, file
        assert a != c or file == "README.md", file
