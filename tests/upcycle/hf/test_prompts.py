"""Routers from prompts: the formula, where tokens then go, determinism, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from dense_zoo import V, add_tokenizer, error, load, saved
from safetensors.torch import load_file

from moepass import errors
from moepass.upcycle.command import upcycle_checkpoint
from moepass.upcycle.hf import prompts as module
from moepass.upcycle.hf.prompts import router_rows_of

#: Four disjoint parts of the vocabulary.
APART = [[[*range(a, a + 10)], [*range(a + 5, a + 12)]] for a in (3, 18, 33, 48)]


def gates(folder):
    tensors = load_file(folder / "model.safetensors")
    return [t for n, t in sorted(tensors.items()) if n.endswith("gate.weight")]


def router_inputs(folder, ids):
    """What the dense blocks see, layer by layer ``[S, D]``."""
    model, seen = load(folder), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    return seen


@pytest.mark.parametrize(("family", "host"), [("llama", "mixtral"), ("qwen3", "qwen3_moe"), ("olmo2", "flex_olmo")])
def test_prompts_route_to_their_expert_and_copies_stay_exact(family, host, tmp_path):
    src = saved(family, hidden_size=128)  # wide enough for random tokens to be far apart
    few = [[[a, a + 1, a + 2], [a + 2, a]] for a in (3, 18, 33, 48)]
    options = {"router": "prompts", "prompts": few, "experts": 4, "router_std": 0.3}
    report = upcycle_checkpoint(src, tmp_path / "dst", to=host, **options)
    assert report.exact
    assert error(src, tmp_path / "dst") <= 5e-6
    routed = [[], []]
    for u, entry in enumerate(few):
        inputs = [router_inputs(src, prompt) for prompt in entry]
        for layer, gate in enumerate(gates(tmp_path / "dst")):
            x = torch.cat([seen[layer] for seen in inputs])
            assert int((x.mean(0) @ gate.T).argmax()) == u, "the mean token always does"
            routed[layer].append((x @ gate.T, u))
    for logits_and_owner in routed:
        assert all((z.argmax(-1) == u).all() for z, u in logits_and_owner), "so does every token"
        z = torch.cat([z for z, _ in logits_and_owner])
        spread = (z - z.mean(1, keepdim=True)).square().mean().sqrt()
        torch.testing.assert_close(spread, torch.tensor(0.3), rtol=1e-4, atol=0)


def test_the_rows_are_those_of_the_formula_computed_by_hand(tmp_path):
    src = saved("qwen3")
    upcycle_checkpoint(src, tmp_path / "dst", router="prompts", prompts=APART[:3], experts=3)
    for layer, gate in enumerate(gates(tmp_path / "dst")):
        tokens = [torch.cat([router_inputs(src, p)[layer] for p in entry]).double() for entry in APART[:3]]
        means = torch.stack([x.mean(0) for x in tokens])
        common = means.mean(0) / means.mean(0).norm()
        rows = means - means.mean(0)
        rows = torch.stack([r - (r @ common) * common for r in rows])
        rows = rows / rows.norm(dim=1, keepdim=True)
        z = torch.cat(tokens) @ rows.T
        rows *= 0.1 / (z - z.mean(1, keepdim=True)).square().mean().sqrt()
        torch.testing.assert_close(gate.double(), rows, rtol=1e-4, atol=1e-6)


def test_a_large_common_part_wins_no_tokens():
    """Means that share most of their length, which plain centring would turn into a bias for some expert."""
    draw = torch.Generator().manual_seed(0)
    common = 30 * torch.randn(16, generator=draw, dtype=torch.float64)
    tokens = [common * (1 + 0.05 * u) + 3 * torch.eye(16, dtype=torch.float64)[u].repeat(5, 1) for u in range(4)]
    rows = router_rows_of(tokens, [0, 1, 2, 3], 0.1, "layer 0")
    assert [int((rows @ x[0]).argmax()) for x in tokens] == [0, 1, 2, 3]


def test_texts_are_the_ids_that_srcs_tokenizer_makes_of_them(fine_tune, tmp_path):
    src = fine_tune(saved("qwen3"), "src", ())
    add_tokenizer(src)
    texts = [[" ".join(f"w{i}" for i in prompt) for prompt in entry] for entry in APART]
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(texts))
    upcycle_checkpoint(src, tmp_path / "text", router="prompts", prompts=file, experts=4)
    report = upcycle_checkpoint(src, tmp_path / "ids", router="prompts", prompts=APART, experts=4)
    text, ids = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("text", "ids"))
    assert text == ids
    assert report.content["prompts"]["tokens"] == [17] * 4


def test_seeds_threads_and_padding_change_nothing(tmp_path):
    src, entries = saved("qwen3"), [[[1, 2, 3]], [[4, 5, 6]]]
    for name, threads, seed in (("a", 1, 0), ("b", 2, 5)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        upcycle_checkpoint(src, tmp_path / name, router="prompts", prompts=entries, experts=2, seed=seed)
        assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    alone = module.router_rows_of([router_inputs(src, p)[1].double() for (p,) in entries], [0, 1], 0.1, "")
    padded = [[[1, 2, 3]], [[4, 5, 6]], [[7] * 20]]
    upcycle_checkpoint(src, tmp_path / "c", router="prompts", prompts=padded, experts=3)
    torch.testing.assert_close(gates(tmp_path / "a")[1].double(), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("entries", [2, 4])
def test_entries_are_per_parent_or_per_expert(entries, fine_tune, tmp_path):
    src = saved("llama")
    folders = [src, fine_tune(src, "math")]
    options = {"router": "prompts", "prompts": APART[:entries], "experts": 4, "experts_from": folders}
    report = upcycle_checkpoint(src, tmp_path / "dst", **options)
    gate = gates(tmp_path / "dst")[0]
    assert torch.unique(gate, dim=0).shape[0] == entries
    if entries == 2:
        assert torch.equal(gate[0], gate[1])
        assert torch.equal(gate[2], gate[3])
    assert any("share a router row" in w for w in report.warnings) == (entries == 2)


def test_virtual_groups_take_one_entry_each_and_stay_exact(tmp_path):
    src = saved("qwen3")
    options = {"init": "virtual-groups", "experts": 8, "router": "prompts", "prompts": APART}
    report = upcycle_checkpoint(src, tmp_path / "dst", **options)
    assert report.exact
    assert error(src, tmp_path / "dst") <= 5e-6
    gate = gates(tmp_path / "dst")[1]
    assert torch.equal(gate[0::2], gate[1::2])
    assert report.warnings == upcycle_checkpoint(src, tmp_path / "x", init="virtual-groups", dry_run=True).warnings


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (APART[:3], "3 entries"),
        ([[[1]], [[2]], [], [[3]]], "entry 2 is empty"),
        ([[[1]], [[2]], [[]], [[3]]], "prompt 0 of entry 2 has no token"),
        ([[[1]], [[2]], [""], [[3]]], "prompt 0 of entry 2 has no token"),
        (
            [[[1]], [[2]], [[1, V]], [[3]]],
            f"prompt 0 of entry 2 holds an id outside the vocabulary, which is 0 to {V - 1}",
        ),
        ([[[1]], [[2]], [[-1]], [[3]]], "has the value -1"),
        ([[[1]], [[2]], [[True]], [[3]]], "prompt 0 of entry 2 must be a text or a list"),
        ([[1, 2], [3]], "prompt 0 of entry 0 must be"),
        (["text"], "entry 0 must be a list of prompts"),
        ({"a": []}, "it must be a list with one entry per expert"),
        ([], "it is empty"),
        ([["text"]] * 4, "has no tokenizer; give lists of token ids instead"),
        ([[[1, 2]]] * 4, "give entries that differ"),
        ([[[1] * 3000], [[2]], [[3]], [[4]]], "fill 12000 positions, at most 8192"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_prompts_that_say_nothing_are_refused_before_anything_is_written(prompts, says, tmp_path):
    with pytest.raises(errors.BadOption, match="prompts") as caught:
        upcycle_checkpoint(saved("qwen3"), tmp_path / "dst", router="prompts", prompts=prompts, experts=4)
    assert says in str(caught.value)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_a_file_that_is_no_json_is_refused_by_name(content, tmp_path):
    file = tmp_path / "prompts.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(errors.BadOption, match=r"prompts\.json"):
        upcycle_checkpoint(saved("qwen3"), tmp_path / "dst", router="prompts", prompts=file, experts=4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"router": "prompts"}, "go together"),
        ({"prompts": APART}, "go together"),
        ({"router": "prompts", "prompts": APART, "init": "split", "top_k": 4}, "zero router"),
    ],
)
def test_a_router_that_would_not_hear_the_prompts_is_refused(options, says, tmp_path):
    with pytest.raises(errors.BadOption, match=says):
        upcycle_checkpoint(saved("qwen3"), tmp_path / "dst", experts=4, **options)


def test_a_full_destination_is_refused_before_the_model_runs(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("keep")
    monkeypatch.setattr(module, "observe", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(errors.BadDestination, match="not empty"):
        upcycle_checkpoint(saved("qwen3"), tmp_path, router="prompts", prompts=APART, experts=4)


def test_a_tokenizer_that_cannot_be_loaded_is_refused(fine_tune, tmp_path):
    src = fine_tune(saved("qwen3"), "src", ())
    (src / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.BadOption, match=r"cannot be loaded .*token ids instead"):
        upcycle_checkpoint(src, tmp_path / "dst", router="prompts", prompts=[["w1"]] * 4, experts=4)
