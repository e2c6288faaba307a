"""Existing MoE blocks in the graphs of torch.compile: what is found, and that it means what the original computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from moe_forms import (
    FF,
    D,
    E,
    K,
    arguments,
    assert_same_function,
    every_expert,
    found,
    grouped_mm,
    histogram,
    megatron,
    olmo_core,
    oracle,
    picked_weights,
    rewriting,
    site,
    sorted_rows,
    swiglu,
    torchtitan,
    torchtitan_product,
)
from torch import nn

from moepass import workloads
from moepass.graph.foreign.find import recognise
from moepass.graph.foreign.site import ForeignExperts


def split(params):
    """w1, w2, w3 of a block whose gate and up are joined."""
    w_in, w_out = params
    return nn.Parameter(w_in[:, :FF].detach()), nn.Parameter(w_out.detach()), nn.Parameter(w_in[:, FF:].detach())


def flat(w1, w2, w3):
    """OLMo-core's parameters: ``[E*F, D]`` each."""
    return w1.reshape(-1, D), w2.transpose(1, 2).reshape(-1, D), w3.reshape(-1, D)


# --- the forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [sorted_rows, picked_weights])
def test_hugging_face_forms_are_found_with_their_operands_in_place(form):
    x, index, weight, w_in, w_out = arguments()
    assert torch.allclose(form(x, index, weight, w_in, w_out), oracle(x, index, weight, w_in, w_out), atol=1e-5)
    block = site(form, x, index, weight, w_in, w_out)
    assert [n.name for n in (block.x, block.index, block.weight.source)] == ["l_x_", "l_index_", "l_weight_"]
    assert [block.ups[0].stack.node.name, block.down.stack.node.name] == ["l_w_in_", "l_w_out_"]
    assert (block.activation, block.K, block.interleaved, block.dropout) == ("silu(g)*u", K, False, 0.0)
    assert not block.ups[0].stack.flipped
    assert not block.down.stack.flipped


@pytest.mark.parametrize("form", [sorted_rows, picked_weights])
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_hugging_face_forms_keep_values_and_gradients(form, biases):
    assert_same_function(form, *arguments(biases=biases))


@pytest.mark.parametrize("form", [sorted_rows, picked_weights])
def test_one_graph_serves_every_token_count(form):
    *_, w_in, w_out, b_in, b_out = arguments(biases=True)
    router, graphs = torch.randn(E, D), []

    def block(x):
        weight, index = torch.topk(torch.softmax(x @ router.T, -1), K)
        return form(x, index, weight, w_in, w_out, b_in, b_out)

    torch._dynamo.reset()
    fast = torch.compile(block, backend=rewriting(graphs), fullgraph=True)
    for T in (12, 2, 5, 257):
        x = torch.randn(T, D)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.allclose(fast(x), block(x), atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize("score_first", [False, True])
def test_torchtitan_form(score_first):
    def form(*args):
        return torchtitan(*args, score_first=score_first)

    x, index, weight, *params = arguments()
    block = site(form, x, index, weight, *split(params))
    assert [g.stack.node.name for g in block.ups] == ["l_args_3_", "l_args_5_"]
    assert block.weight_on_input == score_first
    if not score_first:
        assert torch.allclose(form(x, index, weight, *split(params)), oracle(x, index, weight, *params), atol=1e-5)
    assert_same_function(form, x, index, weight, *split(params))


def test_torchtitan_form_adds_onto_the_shared_expert():
    x, index, weight, *params = arguments()
    assert_same_function(lambda *args: torchtitan(*args, shared=torch.tanh), x, index, weight, *split(params))


def test_torchtitan_product_form():
    x, index, weight, *params = arguments()
    assert torch.allclose(
        torchtitan_product(x, index, weight, *split(params)), oracle(x, index, weight, *params), atol=1e-5
    )
    assert_same_function(torchtitan_product, x, index, weight, *split(params))


def test_olmo_core_form():
    x, index, weight, *params = arguments()
    weights = [nn.Parameter(w.detach().contiguous()) for w in flat(*split(params))]
    assert torch.allclose(olmo_core(x, index, weight, *weights), oracle(x, index, weight, *params), atol=1e-5)
    assert site(olmo_core, x, index, weight, *weights).down.stack.flipped
    assert_same_function(olmo_core, x, index, weight, *weights)


def test_megatron_form_with_probabilities_inside_the_activation():
    x, index, weight, w_in, w_out = arguments()
    turned = [nn.Parameter(w.detach().transpose(1, 2).contiguous()) for w in (w_in, w_out)]
    assert torch.allclose(megatron(x, index, weight, *turned), oracle(x, index, weight, w_in, w_out), atol=1e-5)
    assert_same_function(megatron, x, index, weight, *turned)


@pytest.mark.parametrize("K", [1, 2])
def test_every_expert_on_every_token_becomes_top_k_with_weights_on_the_input(K):
    x, _, _, w_in, w_out = arguments()
    turned = [nn.Parameter(w.detach().transpose(1, 2).contiguous()) for w in (w_in, w_out)]
    logits = torch.randn(x.shape[0], E)
    assert_same_function(lambda *args: every_expert(*args, K=K), x, logits, *turned)


# --- single steps of the proof ----------------------------------------------------------------------------------------


def variant(**change):
    """The sorted form with one step spelled differently; each step is a function of what came before it."""

    def form(x, index, weight, w_in, w_out):
        T, K, E = *index.shape, w_in.shape[0]
        ids, perm = change.get("sort", torch.sort)(index.reshape(-1))
        counts = change.get("count", lambda index, ids: histogram(ids, E))(index, ids)
        offs = torch.cumsum(counts, 0, dtype=torch.int32)
        rows = change.get("gather", lambda x, perm: x[perm // K])(x, perm)
        h = change.get("act", swiglu)(grouped_mm(rows, w_in.transpose(1, 2), offs))
        y = grouped_mm(h, w_out.transpose(1, 2), offs)
        y = y * weight.reshape(-1)[perm].unsqueeze(-1)
        return change.get("combine", combine)(y, perm, T, K)

    return form


def combine(y, perm, T, K):
    return y[torch.argsort(perm)].view(T, K, -1).sum(1)


def half_relu(h):
    gate, up = h.split(FF, dim=-1)
    return up * F.relu(gate).square()


STEPS = {
    "stable_sort": variant(sort=lambda ids: torch.sort(ids, stable=True)),
    "argsort": variant(sort=lambda ids: (ids[p := torch.argsort(ids)], p)),
    "counts_of_the_unsorted": variant(count=lambda index, ids: histogram(index.reshape(-1), E)),
    "counts_one_hot": variant(count=lambda index, ids: F.one_hot(index, E).sum((0, 1))),
    "counts_scattered": variant(count=lambda index, ids: torch.zeros(E).scatter_add_(0, ids, torch.ones(ids.shape))),
    "rows_repeated_then_sorted": variant(gather=lambda x, perm: x.repeat_interleave(K, 0)[perm]),
    "rows_expanded_then_sorted": variant(gather=lambda x, perm: x[:, None].expand(-1, K, -1).reshape(-1, D)[perm]),
    "tokens_by_div": variant(gather=lambda x, perm: x[torch.div(perm, K, rounding_mode="floor")]),
    "inverse_by_scatter": variant(
        combine=lambda y, perm, T, K: (
            y[torch.empty_like(perm).scatter_(0, perm, torch.arange(T * K))].view(T, K, -1).sum(1)
        )
    ),
    "scattered_by_token": variant(combine=lambda y, perm, T, K: torch.zeros(T, D).index_add(0, perm // K, y)),
    "in_place_activation": variant(act=lambda h: F.silu(h[:, :FF], inplace=False).mul_(h[:, FF:])),
    "up_before_gate": variant(act=lambda h: F.silu(h[:, FF:]) * h[:, :FF]),
    "interleaved": variant(act=lambda h: F.silu(h[..., ::2]) * h[..., 1::2]),
    "relu_squared": variant(act=half_relu),
}


@pytest.mark.parametrize("step", STEPS)
def test_steps_have_many_spellings(step):
    form = STEPS[step]
    assert_same_function(form, *arguments())


def test_interleaved_rows_are_a_flag_and_up_before_gate_is_a_program():
    assert site(STEPS["interleaved"], *arguments()).interleaved
    assert site(STEPS["up_before_gate"], *arguments()).activation == "g*silu(u)"


def test_ungated_experts():
    x, index, weight, w_in, _ = arguments()
    form = variant(act=lambda h: F.relu(h) ** 2)
    w_out = nn.Parameter(torch.randn(E, D, 2 * FF))
    assert site(form, x, index, weight, w_in, w_out).activation == "relu(g)**2"
    assert_same_function(form, x, index, weight, w_in, w_out)


def test_dropout_on_the_hidden_rows_is_kept():
    def form(training):
        return variant(act=lambda h: F.dropout(swiglu(h), 0.25, training=training))

    found = [site(form(training), *arguments()) for training in (True, False)]
    assert [block.dropout for block in found] == [0.25, 0.0]
    assert [workloads.foreign(block, train=True)[0].dropout for block in found] == [True, False]


def test_bfloat16_weights_with_float32_rows_are_cast_as_before():
    def form(x, index, weight, w_in, w_out):
        ids, perm = torch.sort(index.reshape(-1))
        offs = torch.cumsum(histogram(ids, E), 0, dtype=torch.int32)
        h = swiglu(F.grouped_mm(x[perm // K].bfloat16(), w_in.bfloat16().transpose(1, 2), offs=offs))
        y = F.grouped_mm(h, w_out.bfloat16().transpose(1, 2), offs=offs).float()
        return combine(y * weight.reshape(-1)[perm].unsqueeze(-1), perm, *index.shape)

    assert_same_function(form, *arguments(), tolerance=2e-2)


@pytest.mark.parametrize("form", [sorted_rows, picked_weights, megatron])
def test_exported_graphs_are_read_too(form):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            *_, w_in, w_out = arguments()
            turn = form is megatron
            self.w_in, self.w_out = (nn.Parameter(w.detach().transpose(1, 2)) if turn else w for w in (w_in, w_out))

        def forward(self, x, index, weight):
            return form(x, index, weight, self.w_in, self.w_out)

    exported = torch.export.export(Module(), arguments()[:3])
    (only,) = recognise(exported.graph_module)
    assert isinstance(only, ForeignExperts), only
    assert only.activation == "silu(g)*u"


def test_several_blocks_of_one_graph_are_told_apart():
    args = arguments()

    def form(x, index, weight, w_in, w_out):
        y = x + sorted_rows(x, index, weight, w_in, w_out)
        return y + picked_weights(y, index.flip(1), weight.flip(1), w_in, w_out)

    blocks = found(form, *args)
    assert [type(b).__name__ for b in blocks] == ["ForeignExperts"] * 2
    assert_same_function(form, *args)


def test_a_graph_without_experts_has_no_verdicts():
    assert (
        found(lambda x, w: F.linear(x, w).repeat_interleave(2, 0).sort(0)[0], torch.randn(3, 4), torch.randn(5, 4))
        == []
    )
