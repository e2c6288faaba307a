"""What real modules do around their FFNs: dropout, checkpointing, tied weights, autocast, LoRA, heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tracing import captured, codes, verdicts
from zoo import build

from moepass.graph.dense import recognise_all
from moepass.graph.names import parameter_fqn
from moepass.graph.site import DenseFFN


class Block(nn.Module):
    def __init__(self, width: int = 16, hidden: int = 32, p: float = 0.1) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        return self.fall(self.dropout(F.gelu(self.rise(x))))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


X = torch.randn(5, 16)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("train", "probability"), [(True, 0.1), (False, 0.0)])
def test_dropout_counts_in_training_mode_only(train, probability, dynamic):
    (site,) = verdicts(Block().train(train), X, dynamic=dynamic)
    assert (site.program, site.dropout) == ("gelu(g)", probability)


def test_dropout_of_an_exported_training_graph_is_kept():
    exported = torch.export.export(Block().train(), (X,))
    ((_, site),) = recognise_all(exported.module())
    assert (site.program, site.dropout) == ("gelu(g)", 0.1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_checkpointed_block_is_found_in_its_body(dynamic):
    (gm,) = captured(Checkpointed(), X.clone().requires_grad_(), dynamic=dynamic)
    assert [path for path, _ in gm.meta["found"]] == [("wrap_body_0",), ("wrap_body_1",)]
    assert all(isinstance(site, DenseFFN) for _, site in gm.meta["found"])


def test_a_body_that_lost_its_metadata_asks_the_call_for_its_parameters():
    (gm,) = captured(Checkpointed(), X.clone().requires_grad_())
    body = gm.wrap_body_0
    for node in body.graph.nodes:
        if node.op == "placeholder":
            node.meta["example_value"] = node.meta["example_value"].detach()
    found = recognise_all(gm)
    assert codes([site for _, site in found]) == ["site", "site"]


def test_a_training_llama_with_checkpointing_has_its_sites():
    zoo = build("llama")
    zoo.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = verdicts(zoo.model.train(), use_cache=False, **zoo.inputs(7))
    assert [s.program for s in found] == ["silu(g)*u"] * 2


def test_two_calls_of_one_block_are_two_sites_with_one_weight():
    block = Block().eval()
    a, between, b = verdicts(lambda x: block(torch.tanh(block(torch.tanh(x)))), X)
    assert codes([a, between, b]) == ["site", "overlaps", "site"]
    assert a.down.weight is b.down.weight
    assert a.output is not b.output


def test_an_lm_head_tied_to_the_embedding_is_no_candidate():
    zoo = build("llama")
    zoo.model.config.tie_word_embeddings = True
    zoo.model.lm_head.weight = zoo.model.model.embed_tokens.weight
    with torch.no_grad():
        found = verdicts(zoo.model, **zoo.inputs(7))
    assert codes(found) == ["site", "site"]


def test_a_lora_pair_has_no_nonlinearity():
    base, a, b = nn.Linear(16, 16), nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
    assert codes(verdicts(lambda x: base(x) + 2.0 * b(a(F.dropout(x, 0.1, True))), X)) == ["no_nonlinearity"]


def test_a_pooler_changes_the_width():
    dense, classifier = nn.Linear(16, 16), nn.Linear(16, 3)
    assert codes(verdicts(lambda x: classifier(torch.tanh(dense(x[:1]))), X)) == ["width_changes"]


def test_a_hidden_tensor_that_is_returned_escapes():
    block = Block().eval()

    def both(x):
        h = F.gelu(block.rise(x))
        return block.fall(h), h

    assert codes(verdicts(both, X)) == ["hidden_escapes"]


def test_a_hidden_tensor_whose_size_is_asked_does_not_escape():
    block = Block().eval()

    def sized(x):
        h = F.gelu(block.rise(x))
        return block.fall(h), torch.zeros(h.size(0))

    assert codes(verdicts(sized, X, dynamic=True)) == ["site"]


def test_autocast_around_the_block_is_fine_and_across_it_is_not():
    block = Block().eval()

    def around(x):
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    def across(x):
        with torch.autocast("cpu", torch.bfloat16):
            h = F.gelu(block.rise(x))
        with torch.autocast("cpu", torch.bfloat16):
            return block.fall(h)

    assert codes(verdicts(around, X)) == ["site"]
    assert codes(verdicts(across, X)) == ["crosses_autocast"]


def test_in_place_activation_and_residual_are_fine():
    rise, fall = nn.Linear(16, 32), nn.Linear(32, 16)

    def block(x):
        y = fall(F.relu(rise(torch.tanh(x)), inplace=True))
        y += x
        return y

    (site,) = verdicts(block, X)
    assert site.program == "relu(g)"


def test_weights_without_a_module_are_parameters_or_not():
    w1, w2 = torch.randn(32, 16), torch.randn(16, 32)

    def mlp(x, a, b):
        return F.linear(torch.relu(F.linear(x, a)), b)

    assert codes(verdicts(mlp, X, w1, w2)) == ["weight_not_parameter"]
    assert codes(verdicts(mlp, X, nn.Parameter(w1), nn.Parameter(w2))) == ["site"]


def test_merged_lora_and_weight_norm_are_computed_weights():
    block = Block().eval()
    nn.utils.parametrizations.weight_norm(block.rise)
    assert codes(verdicts(block, X)) == ["weight_not_parameter"]


def test_lora_on_every_projection_is_never_a_site():
    base, a, b = Block().eval(), nn.Linear(16, 4, bias=False), nn.Linear(4, 32, bias=False)
    found = verdicts(lambda x: base.fall(F.gelu(base.rise(x) + b(a(x)))), X)
    assert sorted(codes(found)) == ["inputs_differ", "no_nonlinearity"]


def test_a_block_between_residual_projections_without_embedding_is_found_alone():
    start, blocks, head = nn.Linear(7, 16), nn.ModuleList(Block() for _ in range(3)).eval(), nn.Linear(16, 7)

    def net(x):
        h = start(x)
        for block in blocks:
            h = h + block(F.layer_norm(h, (16,)))
        return head(F.layer_norm(h, (16,)))

    found = verdicts(net, torch.randn(5, 7))
    assert codes(found) == ["site"] * 3


def test_half_precision_and_integer_inputs_do_not_confuse_it():
    (site,) = verdicts(Block().bfloat16().eval(), X.bfloat16())
    assert site.program == "gelu(g)"


def test_names_survive_a_graph_copy_without_sources():
    (gm,) = captured(Block().eval(), X)
    ((_, site),) = gm.meta["found"]
    for node in (n for n in gm.graph.nodes if n.op == "placeholder"):
        node._dynamo_source = None
    assert parameter_fqn(site.down.weight) == "fall.weight"
