"""Router losses: every convention against loops over its formula and against transformers, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func as olmoe_loss

from moepass import errors
from moepass.nn.losses import (
    attach_loss,
    balance_index,
    balance_scores,
    expert_counts,
    hf_load_balancing_loss,
    load_balancing_loss,
    router_z_loss,
)
from moepass.spec import RouterSpec

B, S, E, K = 3, 7, 5, 2
CONVENTIONS = ("olmo_core_local", "olmo_core_instance", "maxtext", "hf", "automodel", "megatron")
BALANCED = {name: K if name in ("maxtext", "hf") else 1 for name in CONVENTIONS}


def skewed(T=B * S, seed=0):
    """Logits of tokens that like the first experts, their scores and their two experts."""
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = (logits + torch.linspace(2, 0, E)).requires_grad_()
    return logits, logits.softmax(-1), logits.topk(K).indices


def padding(seed=0):
    """A mask with a full sequence, one with padding, and one with a single token."""
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2, 1:] = False
    return mask


# --- the formulas, as loops over tokens, slots and experts -----------------------------------------------------------


def share_products(P, index, rows):
    """``sum_e c_e * sum_t P_te`` over some tokens, a loop per symbol."""
    total = P.new_zeros(())
    for e in range(E):
        count, score = 0, P.new_zeros(())
        for t in rows:
            count += sum(int(index[t, k]) == e for k in range(index.shape[1]))
            score = score + P[t, e]
        total = total + count * score
    return total


def by_loops(convention, P, index, mask, D):
    valid = [t for t in range(P.shape[0]) if bool(mask.reshape(-1)[t])]
    N = len(valid)
    per_sequence = [[t for t in valid if t // S == b] for b in range(P.shape[0] // S)]
    per_sequence = [rows for rows in per_sequence if rows]
    if convention == "olmo_core_local":
        return E / K * share_products(P, index, valid) / N / (D or N)
    if convention == "olmo_core_instance":
        return E / K * sum(share_products(P, index, rows) / len(rows) for rows in per_sequence) / (D or N)
    if convention == "maxtext":  # E^2 * mean over sequences and experts
        terms = [share_products(P, index, rows) / len(rows) ** 2 for rows in per_sequence]
        return E**2 * sum(terms) / (len(terms) * E)
    if convention == "hf":
        return E * share_products(P, index, valid) / N**2
    if convention == "automodel":  # sum_e f_e P_e, f_e = c_e E / (K T), P_e = sum_t s_te / T
        return share_products(P, index, valid) * E / (K * N) / N
    return E / (K * N**2) * share_products(P, index, valid)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_value_and_gradient_equal_the_formula_written_as_loops(convention, masked):
    logits, P, index = skewed()
    mask = padding() if masked else None
    D = 50.0 if convention.startswith("olmo") and masked else None
    loss = load_balancing_loss(P, index, convention, sequences=(B, S), mask=mask, loss_div_factor=D)
    expected = by_loops(convention, P, index, torch.ones(B, S) if mask is None else mask, D)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    assert expected_grad.abs().max() > 1e-4
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_value_at_perfect_balance(convention):
    P = torch.full((2 * E, E), 1 / E, dtype=torch.float64)
    index = (torch.arange(2 * E * K) % E).view(-1, K)
    loss = load_balancing_loss(P, index, convention, sequences=(2, E))
    assert loss.item() == pytest.approx(BALANCED[convention])


def test_conversions_between_the_conventions_on_a_skewed_batch():
    _, P, index = skewed()
    value = {name: load_balancing_loss(P, index, name, sequences=(B, S)).item() for name in CONVENTIONS}
    assert value["olmo_core_local"] > 1.05
    for other in (value["automodel"], value["megatron"], value["hf"] / K):
        assert value["olmo_core_local"] == pytest.approx(other)
    assert value["olmo_core_instance"] == pytest.approx(value["maxtext"] / K)
    assert abs(value["olmo_core_instance"] - value["olmo_core_local"]) > 1e-3


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_one_sequence_makes_all_levels_alike(convention):
    _, P, index = skewed()
    local = load_balancing_loss(P, index, "olmo_core_local")
    torch.testing.assert_close(load_balancing_loss(P, index, convention), BALANCED[convention] * local)


@pytest.mark.parametrize("function", [olmoe_loss, mixtral_loss])
@pytest.mark.parametrize("masked", [False, True])
def test_hf_loss_equals_transformers_over_layers_that_disagree(function, masked):
    layers = [skewed(seed=seed) for seed in range(3)]
    logits = [layer[0] for layer in layers]
    mask = padding().long() if masked else None
    expected = function(tuple(logits), num_experts=E, top_k=K, attention_mask=mask)
    loss = hf_load_balancing_loss([layer[1] for layer in layers], [layer[2] for layer in layers], mask)
    torch.testing.assert_close(loss, expected.double(), rtol=1e-6, atol=0)
    grads = torch.autograd.grad(loss, logits)
    for grad, reference in zip(grads, torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-5, atol=1e-8)
    mean_of_layers = sum(load_balancing_loss(P, index, "hf", mask=mask) for _, P, index in layers) / 3
    assert abs(mean_of_layers - loss) > 1e-4  # mixing layers is not the same as averaging their losses


def test_hf_loss_needs_scores_and_indices_of_each_layer():
    _, P, index = skewed()
    with pytest.raises(errors.NoLayers, match="2 score tensors and 1 index"):
        hf_load_balancing_loss([P, P], [index])
    with pytest.raises(errors.NoLayers):
        hf_load_balancing_loss([], [])


@pytest.mark.parametrize("convention", ["maxtext", "hf", "automodel", "megatron"])
def test_a_divisor_is_refused_where_the_convention_has_its_own(convention):
    _, P, index = skewed()
    with pytest.raises(errors.LossDivFactor, match=convention):
        load_balancing_loss(P, index, convention, loss_div_factor=10.0)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_no_token_gives_zero_and_no_nan(convention):
    P = torch.empty(0, E).softmax(-1).requires_grad_()
    index = torch.empty(0, K, dtype=torch.int64)
    for sequences in ((0, 7), (2, 0), None):
        loss = load_balancing_loss(P, index, convention, sequences=sequences)
        assert loss.item() == 0
    _, P, index = skewed()
    nothing = load_balancing_loss(P, index, convention, sequences=(B, S), mask=torch.zeros(B, S))
    assert nothing.item() == 0


def test_sentinel_indices_and_masked_tokens_are_not_counted():
    index = torch.tensor([[0, 1], [5, 1], [4, 5], [2, 2]], dtype=torch.int32)
    assert expert_counts(index, E)[0].tolist() == [1, 2, 2, 0, 1]
    assert expert_counts(index, E, mask=torch.tensor([1, 1, 1, 0]))[0].tolist() == [1, 2, 0, 0, 1]
    assert expert_counts(index, E, sequences=(2, 2)).tolist() == [[1, 2, 0, 0, 0], [0, 0, 2, 0, 1]]


# --- the scores that enter -------------------------------------------------------------------------------------------


def test_scores_of_softmax_routing_are_the_same_everywhere():
    logits, P, _ = skewed()
    for convention in CONVENTIONS:
        torch.testing.assert_close(balance_scores(logits, convention, RouterSpec(top_k=K)), P)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_other_scores_are_brought_to_the_form_of_each_system(score):
    logits, softmax, _ = skewed()
    raw = logits.sigmoid() if score == "sigmoid" else (1 + logits.exp()).log().sqrt()
    spec = RouterSpec(top_k=K, score=score)
    for convention in ("olmo_core_local", "olmo_core_instance", "automodel", "megatron"):
        P = balance_scores(logits, convention, spec)
        torch.testing.assert_close(P, raw / raw.sum(-1, keepdim=True), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(balance_scores(logits, "hf", spec), softmax)
    # MaxText takes the softmax of what its gate returns, and the gate has applied the score function and the bias.
    bias = torch.linspace(-1, 1, E, dtype=torch.float64)
    torch.testing.assert_close(balance_scores(logits, "maxtext", spec, bias_E=bias), (raw + bias).softmax(-1))
    unnormalised = RouterSpec(top_k=K, score=score, normalize=None)
    torch.testing.assert_close(balance_scores(logits, "automodel", unnormalised), raw)


def test_hf_and_megatron_count_their_own_top_k_where_a_bias_swayed_the_choice():
    _, P, index = skewed()
    swayed = (index + 1) % E
    for convention in CONVENTIONS:
        own = convention in ("hf", "megatron")
        for spec in (RouterSpec(top_k=K, bias=True), RouterSpec(top_k=K, groups=2, kept_groups=2)):
            assert torch.equal(balance_index(P, swayed, convention, spec), index if own else swayed)
        assert balance_index(P, swayed, convention, RouterSpec(top_k=K)) is swayed


# --- z-loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss_equals_a_loop(masked):
    logits, _, _ = skewed()
    mask = padding() if masked else torch.ones(B, S, dtype=torch.bool)
    rows = [t for t in range(B * S) if mask.view(-1)[t]]
    total = sum(torch.log(sum(torch.exp(logits[t, e]) for e in range(E))) ** 2 for t in rows)
    for convention in ("olmo_core", "megatron"):
        loss = router_z_loss(logits, convention, mask=mask if masked else None)
        torch.testing.assert_close(loss, total / len(rows))
        grad, expected = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (loss, total / len(rows)))
        torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(router_z_loss(logits, mask=mask, loss_div_factor=50.0), total / 50)
    with pytest.raises(errors.LossDivFactor, match="megatron"):
        router_z_loss(logits, "megatron", loss_div_factor=50.0)


def test_masked_logits_may_hold_anything():
    logits, _, index = skewed()
    broken = logits.detach().clone()
    broken[~padding().view(-1)] = math.nan
    broken.requires_grad_()
    loss = router_z_loss(broken, mask=padding())
    loss.backward()
    torch.testing.assert_close(loss, router_z_loss(logits, mask=padding()))
    assert broken.grad.isfinite().all()
    P = broken.detach().softmax(-1)
    assert load_balancing_loss(P, index, "hf", mask=padding()).isfinite()


def test_z_loss_of_no_token_is_zero():
    assert router_z_loss(torch.empty(0, E)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype):
    logits, P, index = skewed()
    assert load_balancing_loss(P.to(dtype), index, "hf").dtype == torch.float32
    assert router_z_loss(logits.to(dtype)).dtype == torch.float32
    assert balance_scores(logits.to(dtype), "hf", RouterSpec(top_k=K)).dtype == torch.float32


# --- attaching -------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A layer whose loss is attached, or returned beside its output."""

    def __init__(self, attach=True, scale=1):
        super().__init__()
        self.gate, self.out = nn.Linear(4, E), nn.Linear(4, 4)
        self.attach, self.scale = attach, scale

    def forward(self, x):
        P = self.gate(x).softmax(-1)
        loss = load_balancing_loss(P, P.topk(K).indices, "olmo_core_local")
        y = self.out(x) * P[:, :1]
        return attach_loss(y, loss, self.scale) if self.attach else (y, loss)


def gradients_of_both(run, scale=1, steps=1):
    """Gradients of ``run(layer with the loss attached)`` and of the sum written out."""
    torch.manual_seed(0)
    attached = Gated(scale=scale)
    plain = Gated(attach=False)
    plain.load_state_dict(attached.state_dict())
    for step in range(steps):
        x = torch.randn(6 + step, 4)
        y = run(attached, x)
        expected, loss = plain(x)
        assert torch.equal(y.detach(), expected.detach()) or torch.allclose(y, expected, atol=1e-6)
        y.square().sum().backward()
        (expected.square().sum() + scale * loss).backward()
    return [p.grad for p in attached.parameters()], [p.grad for p in plain.parameters()]


@pytest.mark.parametrize("scale", [1, 0.25, torch.tensor(8.0)])
def test_attached_loss_adds_its_gradient_and_leaves_the_value(scale):
    for grad, expected in zip(*gradients_of_both(lambda f, x: f(x), scale), strict=True):
        torch.testing.assert_close(grad, expected)


def test_attached_losses_accumulate_over_micro_batches():
    for grad, expected in zip(*gradients_of_both(lambda f, x: f(x), steps=3), strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_attached_loss_counts_once_under_activation_checkpointing(reentrant):
    def run(layer, x):
        return checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant)

    for grad, expected in zip(*gradients_of_both(run), strict=True):
        torch.testing.assert_close(grad, expected)


#: Inductor with checkpointing alone: it compiles all that the case without it does.
COMPILERS = [
    *((name, checkpointed) for name in ("aot_eager", "moepass") for checkpointed in (False, True)),
    pytest.param("inductor", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("backend", "checkpointed"), COMPILERS)
def test_attached_loss_compiles_in_one_graph(backend, checkpointed):
    options = {"options": {"inner": "aot_eager"}} if backend == "moepass" else {}
    torch.compiler.reset()
    compiled = {}

    def run(layer, x):
        if not compiled:

            def forward(x):
                return checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)

            compiled["f"] = torch.compile(forward, backend=backend, fullgraph=True, dynamic=True, **options)
        return compiled["f"](x)

    for grad, expected in zip(*gradients_of_both(run, steps=3), strict=True):
        torch.testing.assert_close(grad, expected)


def test_attaching_to_an_output_without_gradient_is_harmless():
    with torch.no_grad():
        y = torch.ones(3)
        assert torch.equal(attach_loss(y, torch.tensor(2.0)), y)
    x = torch.ones(3)
    w = torch.ones((), requires_grad=True)
    attach_loss(x, 3 * w).sum().backward()  # only the loss needs one
    assert w.grad.item() == 3
