"""Inputs and activations of dense blocks, against a model that is loaded whole."""

from __future__ import annotations

import pytest
import torch

from moepass import errors
from moepass.upcycle.checkpoint.observe import observe
from tests import dense_zoo

IDS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("family", ["qwen3", "phi3"])  # separate and fused input projections
def test_blocks_see_what_they_see_in_the_whole_model(family):
    folder = dense_zoo.saved(family)
    model = dense_zoo.load(folder)
    seen = []
    observe(folder, IDS, lambda layer, x, a: seen.append((layer, x, a)))

    expected = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda m, args: expected.append(args[0]))
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: expected.append(args[0]))
    with torch.no_grad():
        model(input_ids=IDS)

    assert [layer for layer, *_ in seen] == list(range(len(model.model.layers)))
    for found, wanted in zip((t for _, *pair in seen for t in pair), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_padding_on_the_right_changes_nothing_before_it():
    seen = {}
    folder = dense_zoo.saved("llama")
    padded = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.long)], 1)
    observe(folder, IDS, lambda layer, x, a: seen.__setitem__(layer, (x, a)))
    observe(folder, padded, lambda layer, x, a: torch.testing.assert_close((x[:, :6], a[:, :6]), seen[layer]))


def test_a_model_without_dense_blocks_is_refused(tmp_path):
    folder = dense_zoo.save(tmp_path / "gpt2", "gpt2")

    with pytest.raises(errors.NotVerifiable, match=r"decoder layers|down_proj"):
        observe(folder, IDS, lambda *_: None)
