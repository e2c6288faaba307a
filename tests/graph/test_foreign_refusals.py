"""Near misses: everything that looks like experts and is not proven gets a stable reason; nothing is guessed."""

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
    every_expert,
    found,
    grouped_mm,
    histogram,
    picked_weights,
    sorted_rows,
    swiglu,
)
from torch import nn
from tracing import traced

from moepass.graph.dense import recognise as recognise_dense
from moepass.graph.foreign.find import recognise
from moepass.graph.site import EXPERT_REASONS, REASONS, Rejected


def block(**change):
    """The sorted form; a keyword replaces one step."""

    def form(x, index, weight, w_in, w_out):
        s = {name: change.get(name, default) for name, default in STEPS.items()}
        ids, perm = s["sort"](index.reshape(-1))
        offs = s["offsets"](ids, index)
        rows = s["gather"](x, perm)
        h = s["act"](grouped_mm(rows, w_in.transpose(1, 2), offs))
        y = s["out"](grouped_mm(h, w_out.transpose(1, 2), offs), ids)
        y = s["weigh"](y, weight, perm)
        return s["combine"](y, perm, index.shape[0])

    return form


STEPS = {
    "sort": torch.sort,
    "offsets": lambda ids, index: torch.cumsum(histogram(ids, E), 0, dtype=torch.int32),
    "gather": lambda x, perm: x[perm // K],
    "act": swiglu,
    "out": lambda y, ids: y,
    "weigh": lambda y, weight, perm: y * weight.reshape(-1)[perm].unsqueeze(-1),
    "combine": lambda y, perm, T: y[torch.argsort(perm)].view(T, K, -1).sum(1),
}


def cumulative(counts):
    return torch.cumsum(counts, 0, dtype=torch.int32)


def in_place(y, ids):
    y.mul_(2)
    return y


REFUSALS = {
    "descending_sort": ("unknown_order", {"sort": lambda ids: torch.sort(ids, descending=True)}),
    "rows_of_another_permutation": ("unknown_order", {"gather": lambda x, perm: x[perm.flip(0) // K]}),
    "rows_by_remainder": ("unknown_order", {"gather": lambda x, perm: x[perm % x.shape[0]]}),
    "rows_by_another_k": ("moe_form", {"gather": lambda x, perm: x[perm // (K + 1)]}),
    "rows_of_slots_first": ("unknown_order", {"gather": lambda x, perm: x.repeat(K, 1)[perm].tanh()}),
    "offsets_of_other_ids": (
        "unknown_order",
        {"offsets": lambda ids, index: cumulative(histogram(index.flip(0).reshape(-1), E))},
    ),
    "offsets_shifted": ("offsets_not_proven", {"offsets": lambda ids, index: cumulative(histogram(ids, E)) + 0}),
    "counts_not_summed": ("offsets_not_proven", {"offsets": lambda ids, index: histogram(ids, E).int()}),
    "counts_of_fewer_bins": (
        "offsets_not_proven",
        {"offsets": lambda ids, index: cumulative(torch.histc(ids.float(), E, 0, E // 2))},
    ),
    "norm_between": ("not_pointwise", {"act": lambda h: F.layer_norm(swiglu(h), (FF,))}),
    "unknown_function": ("unknown_activation", {"act": lambda h: torch.sinc(swiglu(h))}),
    "tensor_in_the_program": ("tensor_in_program", {"act": lambda h: swiglu(h) * torch.arange(FF)}),
    "cast_in_the_program": ("cast_in_program", {"act": lambda h: swiglu(h.double()).float()}),
    "linear_program": ("no_nonlinearity", {"act": lambda h: h[:, :FF] + h[:, FF:]}),
    "one_half_unused": ("moe_form", {"act": lambda h: F.silu(h[:, :FF])}),
    "overlapping_halves": ("moe_form", {"act": lambda h: F.silu(h[:, :FF]) * h[:, 1 : FF + 1]}),
    "post_expert_norm": ("moe_combine", {"out": lambda y, ids: F.rms_norm(y, (D,))}),
    "sentinel_mask": (
        "moe_combine",
        {"out": lambda y, ids: y.masked_fill((ids >= E).unsqueeze(-1), 0.0)},
    ),
    "in_place_after_the_experts": ("moe_combine", {"out": in_place}),
    "weights_not_sorted": (
        "unknown_order",
        {"weigh": lambda y, weight, perm: y * weight.reshape(-1).unsqueeze(-1)},
    ),
    "weights_per_feature": ("moe_combine", {"weigh": lambda y, weight, perm: y * weight.sum()}),
    "weights_twice": (
        "moe_combine",
        {"weigh": lambda y, weight, perm: STEPS["weigh"](STEPS["weigh"](y, weight, perm), weight, perm)},
    ),
    "not_unsorted": ("unknown_order", {"combine": lambda y, perm, T: y.view(T, K, -1).sum(1)}),
    "unsorted_by_the_permutation_itself": (
        "unknown_order",
        {"combine": lambda y, perm, T: y[perm].view(T, K, -1).sum(1)},
    ),
    "summed_over_the_wrong_dimension": (
        "unknown_order",
        {"combine": lambda y, perm, T: y[torch.argsort(perm)].view(K, T, -1).sum(0)},
    ),
    "summed_over_too_many": (
        "moe_form",
        {"combine": lambda y, perm, T: y[torch.argsort(perm)].view(T // 2, 2 * K, -1).sum(1)},
    ),
    "maximum_over_choices": (
        "moe_combine",
        {"combine": lambda y, perm, T: y[torch.argsort(perm)].view(T, K, -1).amax(1)},
    ),
    "scattered_by_pair": (
        "moe_form",
        {"combine": lambda y, perm, T: torch.zeros(T * K, D).index_add(0, perm, y)},
    ),
    "scattered_into_more_rows": (
        "moe_form",
        {"combine": lambda y, perm, T: torch.zeros(T + 3, D).index_add(0, perm // K, y)},
    ),
    "scattered_twice_as_much": (
        "moe_combine",
        {"combine": lambda y, perm, T: torch.zeros(T, D).index_add(0, perm // K, y, alpha=2)},
    ),
    "combined_by_einsum": (
        "moe_not_understood",
        {"combine": lambda y, perm, T: torch.einsum("tkd,k->td", y[torch.argsort(perm)].view(T, K, -1), torch.ones(K))},
    ),
    "never_summed": ("moe_form", {"combine": lambda y, perm, T: y}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_unproven_step_is_refused_with_a_reason(name):
    code, change = REFUSALS[name]
    verdicts = found(block(**change), *arguments())
    assert verdicts
    assert all(isinstance(v, Rejected) for v in verdicts)
    assert code in {v.code for v in verdicts}
    assert all(v.detail and v.code in REASONS | EXPERT_REASONS for v in verdicts)


def test_every_reason_has_a_test():
    assert set(EXPERT_REASONS) == {code for code, _ in REFUSALS.values()} & set(EXPERT_REASONS) | {"eager_loop"}


def test_experts_on_both_sides_of_an_autocast_border():
    def form(x, index, weight, w_in, w_out):
        ids = index.reshape(-1)
        with torch.autocast("cpu", torch.bfloat16):
            h = torch.bmm(w_in[ids], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
        y = torch.bmm(w_out.bfloat16()[ids], swiglu(h).unsqueeze(-1)).squeeze(-1) * weight.reshape(-1, 1)
        return y.view(x.shape[0], K, -1).sum(1)

    assert {v.code for v in found(form, *arguments())} == {"crosses_autocast"}


def test_the_unchanged_block_is_a_site():
    assert not isinstance(found(block(), *arguments())[0], Rejected)


def test_experts_of_another_index_in_the_second_projection():
    def form(x, index, weight, w_in, w_out):
        ids, other = index.reshape(-1), index.flip(1).reshape(-1)
        h = torch.bmm(w_in[ids], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
        y = torch.bmm(w_out[other], swiglu(h).unsqueeze(-1)).squeeze(-1) * weight.reshape(-1, 1)
        return y.view(x.shape[0], K, -1).sum(1)

    assert [v.code for v in found(form, *arguments())] == ["inputs_differ"]


def test_bias_of_other_experts():
    def form(x, index, weight, w_in, w_out, b_in, b_out):
        ids = index.reshape(-1)
        h = torch.bmm(w_in[ids], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1) + b_in[ids.flip(0)]
        y = torch.bmm(w_out[ids], swiglu(h).unsqueeze(-1)).squeeze(-1) * weight.reshape(-1, 1)
        return y.view(x.shape[0], K, -1).sum(1)

    assert {v.code for v in found(form, *arguments(biases=True))} == {"unknown_order"}


def test_gathered_weights_in_an_einsum():
    def form(x, index, weight, w_in, w_out):
        h = swiglu(torch.einsum("td,tkfd->tkf", x, w_in[index]))
        return torch.einsum("tkf,tkdf,tk->td", h, w_out[index], weight)

    assert {v.code for v in found(form, *arguments())} == {"moe_form"}


def test_hidden_rows_that_someone_else_reads():
    def form(x, index, weight, w_in, w_out):
        ids = index.reshape(-1)
        h = torch.bmm(w_in[ids], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
        y = torch.bmm(w_out[ids], swiglu(h).unsqueeze(-1)).squeeze(-1) * weight.reshape(-1, 1)
        return y.view(x.shape[0], K, -1).sum(1), h.abs().mean()

    assert {v.code for v in found(form, *arguments())} == {"hidden_escapes"}


def test_tokens_that_change_in_place_before_the_sum():
    def form(x, index, weight, w_in, w_out):
        x = x + 1
        ids = index.reshape(-1)
        h = torch.bmm(w_in[ids], x.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
        x.mul_(2)
        y = torch.bmm(w_out[ids], swiglu(h).unsqueeze(-1)).squeeze(-1) * weight.reshape(-1, 1)
        return y.view(x.shape[0], K, -1).sum(1) + x

    assert {v.code for v in found(form, *arguments())} == {"mutated"}


def test_sum_into_a_tensor_that_is_not_new():
    def form(x, index, weight, w_in, w_out):
        def add(y, perm, T):
            out = x + 1
            out.index_add_(0, perm // K, y)
            return out

        return block(combine=add)(x, index, weight, w_in, w_out)

    assert {v.code for v in found(form, *arguments())} == {"mutated"}


def plain(x, index, weight, w_in, w_out):
    return picked_weights(x, index, weight, w_in, w_out)


def test_quantised_weights():
    def form(x, index, weight, w_in, w_out):
        return sorted_rows(x, index, weight, w_in, w_out)

    x, index, weight, w_in, w_out = arguments()
    assert not isinstance(found(form, x, index, weight, w_in * 2, w_out)[0], Rejected)  # computed weights are fine
    gm = traced(plain, x, index, weight, w_in, w_out)
    for node in gm.graph.nodes:
        if node.name == "w_in":
            node.meta["val"] = w_in.detach().to(torch.float8_e4m3fn)
    assert {v.code for v in recognise(gm)} == {"quantised_weight"}


def test_every_expert_counts_where_zero_gives_something():
    def form(x, logits, w_in, w_out):
        top, index = torch.topk(logits, 1, dim=1)
        scores = torch.sigmoid(torch.full_like(logits, float("-inf")).scatter_(1, index, top))
        rows = x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)
        h = torch.bmm(rows.view(E, -1, D), w_in)
        y = torch.bmm(torch.sigmoid(h[..., :FF]) * (h[..., FF:] + 1), w_out)
        return y.sum(dim=0)

    x, _, _, w_in, w_out = arguments()
    turned = [nn.Parameter(w.detach().transpose(1, 2).contiguous()) for w in (w_in, w_out)]
    assert {v.code for v in found(form, x, torch.randn(x.shape[0], E), *turned)} == {"moe_form"}


def test_every_expert_with_choices_that_may_repeat():
    def form(x, logits, w_in, w_out):
        index = torch.argsort(logits, dim=1)[:, :2] // 2
        scores = torch.zeros_like(logits).scatter_(1, index, logits.gather(1, index))
        gate, up = torch.bmm((x.repeat(E, 1) * scores.T.reshape(-1, 1)).view(E, -1, D), w_in).chunk(2, dim=-1)
        return torch.bmm(up * F.silu(gate), w_out).sum(dim=0)

    x, _, _, w_in, w_out = arguments()
    turned = [nn.Parameter(w.detach().transpose(1, 2).contiguous()) for w in (w_in, w_out)]
    assert all(isinstance(v, Rejected) for v in found(form, x, torch.randn(x.shape[0], E), *turned))


def test_every_expert_with_scores_that_are_not_sparse():
    def form(x, logits, w_in, w_out):
        rows = x.repeat(E, 1) * torch.sigmoid(logits).transpose(0, 1).reshape(-1, 1)
        gate, up = torch.bmm(rows.view(E, -1, D), w_in).chunk(2, dim=-1)
        return torch.bmm(up * F.silu(gate), w_out).sum(dim=0)

    x, _, _, w_in, w_out = arguments()
    turned = [nn.Parameter(w.detach().transpose(1, 2).contiguous()) for w in (w_in, w_out)]
    logits = torch.randn(x.shape[0], E)
    assert all(isinstance(v, Rejected) for v in found(form, x, logits, *turned))
    assert not isinstance(found(every_expert, x, logits, *turned)[0], Rejected)


def test_products_that_are_no_experts_get_no_verdict():
    def cache(q, keys, blocks):  # a paged cache
        return torch.bmm(q, keys[blocks].transpose(1, 2))

    def heads(x, w):  # one projection for each head
        q = torch.bmm(x.expand(4, -1, -1), w)
        return torch.softmax(q @ q.transpose(1, 2), -1)

    assert found(cache, torch.randn(3, 1, D), torch.randn(9, 16, D), torch.tensor([1, 2, 0])) == []
    assert found(heads, torch.randn(1, 5, D), nn.Parameter(torch.randn(4, D, D))) == []


# --- eager loops ------------------------------------------------------------------------------------------------------


def test_head_of_an_eager_loop_is_reported():
    def form(x, router):
        weight, index = torch.topk(torch.softmax(F.linear(x, router), -1), K)
        mask = F.one_hot(index, num_classes=E + 1).permute(2, 1, 0)
        return weight, mask, torch.greater(mask.sum(dim=(-1, -2)), 0)

    (only,) = found(form, torch.randn(5, D), nn.Parameter(torch.randn(E, D)))
    assert (only.code, [n.name for n in only.weights]) == ("eager_loop", ["l_x_", "l_router_"])
    assert "set_experts_implementation" in EXPERT_REASONS["eager_loop"]


def test_one_hot_for_a_loss_is_no_loop():
    def form(index):
        return F.one_hot(index, E).float().mean(0)

    assert found(form, torch.randint(0, E, (5, K))) == []


def test_products_of_slices_joined_again_are_a_loop():
    def form(x, w):
        pieces = x.split([2, 3, 4, 3], dim=0)
        return torch.cat([F.linear(piece, w[e]) for e, piece in enumerate(pieces)], dim=0)

    (only,) = found(form, torch.randn(12, D), nn.Parameter(torch.randn(E, FF, D)))
    assert (only.code, [n.name for n in only.weights]) == ("eager_loop", ["l_w_"])


# --- graphs of nothing but FX nodes -----------------------------------------------------------------------------------


def test_bincount_gives_offsets():
    """Dynamo gives its result no static size, so this form is met in exported graphs only."""

    def form(x, index, weight, w_in, w_out):
        ordered = torch.sort(index.reshape(-1))
        perm = ordered[1]
        offs = torch.cumsum(torch.bincount(ordered[0], minlength=E), 0, dtype=torch.int32)
        h = grouped_mm(x[perm // K], w_in.transpose(1, 2), offs)
        y = grouped_mm(F.silu(h[..., :FF]) * h[..., FF:], w_out.transpose(1, 2), offs)
        return torch.zeros(12, D).index_add(0, perm // K, y * weight.reshape(-1)[perm].unsqueeze(-1))

    (only,) = recognise(traced(form, *arguments()))
    assert not isinstance(only, Rejected)


def test_dense_blocks_and_experts_do_not_claim_each_other():
    gm = traced(plain, *arguments())
    assert recognise_dense(gm) == []
    assert len(recognise(gm)) == 1
