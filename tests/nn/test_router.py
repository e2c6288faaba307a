"""``nn.Router``: the reference's numbers under every compiler, and its own state."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters, get_compilation_metrics
from torch.utils.checkpoint import checkpoint

from moepass import errors, reference
from moepass.nn import Router, post_batch, routing
from moepass.nn.losses import expert_counts
from moepass.spec import DispatchSpec, RouterSpec
from tests.nn.routers import D, E, T, router_of, tokens

UPDATED = RouterSpec(top_k=2, score="sigmoid", bias=True, bias_update_rate=0.25)


# --- the module and the reference ------------------------------------------------------------------------------------

SPECS = {
    "default": RouterSpec(),
    "DeepSeek-V3": RouterSpec(
        top_k=4, score="sigmoid", normalize_eps=1e-20, scale=2.5, bias=True, bias_update_rate=1e-3, groups=4,
        kept_groups=2, linear_bias=True,
    ),
    "scores after top-k": RouterSpec(score_first=False, normalize=None),
    "jitter": RouterSpec(jitter=0.1),
    "uniform": RouterSpec(assignment="uniform"),
    "random": RouterSpec(assignment="random"),
    "balanced": RouterSpec(assignment="balanced"),
    "balanced, noisy": RouterSpec(assignment="balanced", assignment_noise=0.5),
    "expert choice": RouterSpec(choice="expert", normalize=None),
}  # fmt: skip
EXPERT_CHOICE = DispatchSpec(capacity_factor=1.1, scope="sequence")


class Block(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x, mask):
        return self.router(x.reshape(-1, D), mask, tuple(x.shape[:2]))


@pytest.mark.parametrize("name", SPECS)
def test_compiles_in_one_graph_and_one_trace_with_dynamic_tokens(name):
    spec = SPECS[name]
    dispatch = EXPERT_CHOICE if spec.choice == "expert" else None
    block = Block(router_of(spec, dtype=torch.float32, dispatch=dispatch))
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for B, S in ((2, 5), (3, 7), (2, 4)):
        x, mask = tokens(B, S, D, dtype=torch.float32), tokens(B, S, seed=3) > -0.5
        outputs, grads = [], []
        for run in (compiled, block):
            torch.manual_seed(0)
            outputs.append(run(x, mask))
            if outputs[-1].weight_TK.requires_grad:
                grads.append(torch.autograd.grad(outputs[-1].weight_TK.square().sum(), block.router.weight)[0])
        assert torch.equal(outputs[0].index_TK, outputs[1].index_TK)
        torch.testing.assert_close(outputs[0], outputs[1])
        assert len(grads) == (0 if spec.assignment == "balanced" else 2)
        if grads:
            torch.testing.assert_close(*grads)
    assert counter.frame_count == 1
    assert not get_compilation_metrics()[-1].restart_reasons


@pytest.mark.slow
def test_inductor_draws_the_same_assignment_as_eager():
    block = Block(router_of(SPECS["balanced, noisy"], dtype=torch.float32))
    x, mask = tokens(3, 5, D, dtype=torch.float32), tokens(3, 5, seed=3) > -0.5
    torch._dynamo.reset()
    ours, eager = torch.compile(block, fullgraph=True)(x, mask), block(x, mask)
    assert torch.equal(ours.index_TK, eager.index_TK)
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "scores after top-k", "uniform"])
def test_weights_and_scores_are_the_references_in_float64(name):
    spec = SPECS[name]
    router, x = router_of(spec).eval(), tokens(T, D)
    index, weight, scores, logits, _ = router(x)
    torch.testing.assert_close(logits, nn.functional.linear(x, router.weight, router.linear_bias))
    torch.testing.assert_close(scores, reference.scores(logits, spec))
    value = reference.choice_values(logits, spec)
    torch.testing.assert_close(weight, reference.weigh(value, index, spec))
    if spec.assignment == "learned":
        assert torch.equal(index, reference.route(logits, spec, bias=router.bias).index_TK)


@pytest.mark.parametrize("name", SPECS)
def test_masked_tokens_are_nobodys_and_may_hold_nan(name):
    spec = SPECS[name]
    router = router_of(spec, dispatch=EXPERT_CHOICE if spec.choice == "expert" else None).eval()
    real = torch.tensor([[True, True, False], [False, True, True]])
    clean = tokens(6, D)
    dirty = torch.where(real.view(6, 1), clean, torch.nan)
    out, other = router(dirty, real, (2, 3)), router(torch.where(real.view(6, 1), clean, 7.0), real, (2, 3))
    assert (out.index_TK[~real.view(6)] == E).all()
    assert torch.count_nonzero(out.weight_TK[~real.view(6)]) == 0
    assert torch.equal(out.index_TK, other.index_TK)
    torch.testing.assert_close(out.weight_TK, other.weight_TK)
    if out.weight_TK.requires_grad:
        out.weight_TK.sum().backward()
        assert router.weight.grad.isfinite().all()


def test_jitter_multiplies_the_input_in_training_only():
    router, x = router_of(RouterSpec(jitter=0.25)), tokens(T, D)
    plain = nn.functional.linear(x, router.weight)
    assert torch.equal(router.eval()(x).logits_TE, plain)
    router.train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(E, D))  # the logits are the jittered input
    ratio = router(x).logits_TE[:, :D] / x
    assert ((ratio >= 0.75) & (ratio <= 1.25)).all()
    assert ratio.std().item() == pytest.approx(0.5 / 12**0.5, rel=0.2)


def test_jitter_is_the_same_in_the_recomputation_of_a_checkpoint():
    router, x = router_of(RouterSpec(jitter=0.25)), tokens(T, D).requires_grad_()
    grads = []
    for run in (router, lambda x: checkpoint(router, x, use_reentrant=False)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(x).weight_TK.square().sum(), [x, router.weight]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# --- benchmark assignments -------------------------------------------------------------------------------------------


def test_uniform_assignment_is_balanced_and_its_router_still_learns():
    router = router_of(RouterSpec(top_k=3, assignment="uniform"))
    index, weight, *_ = router(tokens(2 * E, D))
    assert index.flatten().tolist() == list(range(E)) * 6
    assert torch.autograd.grad(weight[:, 0].sum(), router.weight)[0].abs().max() > 1e-3


@given(st.sampled_from(["random", "balanced"]), st.sampled_from([0, 1, 7, 64]), st.integers(1, E), st.integers(0, 99))
def test_drawn_assignments_repeat_themselves_and_never_choose_twice(assignment, tokens_, top_k, seed):
    noise = 0.7 if assignment == "balanced" else 0.0
    normalize = None if top_k == 1 else 1.0
    spec = RouterSpec(top_k=top_k, assignment=assignment, assignment_noise=noise, normalize=normalize)
    router, x = router_of(spec, seed), tokens(tokens_, D)
    first, again = router(x), router(x + 1.0)
    assert torch.equal(first.index_TK, again.index_TK), "positions decide, so that recomputation finds the same"
    assert all(len(set(row)) == top_k for row in first.index_TK.tolist())
    if normalize:
        torch.testing.assert_close(first.weight_TK.sum(-1), torch.ones(tokens_, dtype=torch.float64), atol=1e-6, rtol=0)


def test_drawn_assignments_differ_between_layers_and_use_all_experts_alike():
    spec, x = RouterSpec(top_k=2, assignment="random"), tokens(4000, D)
    index, other = router_of(spec, 0)(x).index_TK, router_of(spec, 5)(x).index_TK
    assert (index == other).float().mean() < 0.25
    for i in (index, other):
        assert ((expert_counts(i, E)[0] / 1000 - 1).abs() < 0.15).all()
    pairs = torch.bincount(index[:, 0] * E + index[:, 1], minlength=E * E).view(E, E)
    assert ((pairs[~torch.eye(E, dtype=torch.bool)] / (4000 / 56) - 1).abs() < 0.5).all()


def test_balanced_assignment_is_automodels_fake_gate():
    x = tokens(E, D)
    even = router_of(RouterSpec(top_k=2, assignment="balanced"))(x)
    assert even.index_TK.flatten().tolist() == list(range(E)) * 2
    assert torch.equal(even.weight_TK, torch.full((E, 2), 0.5, dtype=torch.float64))
    assert not even.weight_TK.requires_grad

    def unevenness(noise):
        index, _ = routing.balanced(4096, 8, 64, router_of(RouterSpec()).weight, noise)
        count = expert_counts(index, 64)[0].float()
        return float(count.max() / count.mean())

    assert unevenness(0.0) == 1.0
    assert 1.0 < unevenness(0.1) < 1.3


# --- state: the correction bias --------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_post_batch_moves_the_bias_against_the_load_by_the_sign_rule(centred):
    router = router_of(UPDATED.model_copy(update={"bias_centred": centred}))
    before = router.bias.clone()
    load = sum(expert_counts(router(tokens(T, D, seed=s)).index_TK, E)[0] for s in (1, 2))  # two micro-batches
    assert torch.equal(router.tokens_per_expert, load)
    step = torch.tensor([0.25 * ((c < 2 * T * 2 / E) - (c > 2 * T * 2 / E)) for c in load.tolist()])
    step = step - step.mean() if centred else step
    assert torch.allclose(router.post_batch(dry_run=True), step)
    assert torch.equal(router.bias, before)
    assert torch.equal(router.tokens_per_expert, load)
    assert torch.allclose(router.post_batch(), step)
    assert torch.allclose(router.bias, before + step)
    assert torch.count_nonzero(router.tokens_per_expert) == 0
    assert torch.count_nonzero(router.post_batch()) == 0, "no token, no step"


def test_a_router_that_is_updated_becomes_balanced():
    router = router_of(UPDATED.model_copy(update={"bias_update_rate": 0.01}))
    x, loads = tokens(512, D) + 0.5, []
    for _ in range(100):
        router(x)
        loads.append(float(router.tokens_per_expert.max() / (512 * 2 / E)))
        router.post_batch()
    assert loads[0] > 1.5
    assert loads[-1] < 1.2


def test_counts_are_taken_in_training_only_and_twice_in_a_checkpoint_without_harm():
    router, x = router_of(UPDATED), tokens(T, D).requires_grad_()
    router.eval()(x)
    assert torch.count_nonzero(router.tokens_per_expert) == 0
    router.train()(x)
    once, step = router.tokens_per_expert.clone(), router.post_batch(dry_run=True)
    router.tokens_per_expert.zero_()
    checkpoint(lambda x: router(x).weight_TK.sum().exp().sin(), x, use_reentrant=False).backward()
    assert torch.equal(router.tokens_per_expert, 2 * once)
    assert torch.equal(router.post_batch(dry_run=True), step)


def test_counting_in_a_compiled_checkpoint_gives_the_same_step():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = router_of(UPDATED, dtype=torch.float32)

        def forward(self, x):
            return checkpoint(self.router, x, use_reentrant=False).weight_TK

    layer, x = Layer(), tokens(T, D, dtype=torch.float32)
    layer(x).sum().backward()
    step = layer.router.post_batch(dry_run=True)
    assert torch.count_nonzero(step) > 0
    layer.router.tokens_per_expert.zero_()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert layer.router.tokens_per_expert.sum() in (2 * T, 4 * T)
    assert torch.equal(layer.router.post_batch(dry_run=True), step)


def test_the_model_wide_call_updates_every_router_and_names_it():
    model = nn.ModuleDict({"a": router_of(UPDATED), "plain": router_of(RouterSpec()), "b": router_of(UPDATED, 9)})
    twin = copy.deepcopy(model)
    for m in (model, twin):
        for router in m.values():
            router(tokens(T, D))
    dry = post_batch(model, dry_run=True)
    steps = post_batch(model)
    assert list(steps) == list(dry) == ["a", "b"]
    for name, step in steps.items():
        assert torch.equal(step, dry[name])
        assert torch.equal(step, twin[name].post_batch())
        assert torch.equal(model[name].bias, twin[name].bias)
    assert post_batch(nn.Sequential(router_of(RouterSpec()))) == {}
    with pytest.raises(errors.NoRouters, match=r"post_batch found no moepass\.nn\.Router in Linear"):
        post_batch(nn.Linear(2, 2))


def test_the_correction_bias_stays_in_float32_whatever_the_model_is_cast_to():
    router = router_of(UPDATED, dtype=torch.float32)
    bias = router.bias.clone()
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.bias.dtype == torch.float32
    assert torch.equal(router.bias, bias)
    assert router.tokens_per_expert.dtype == torch.int64
    assert router.double().bias.dtype == torch.float64


def test_state_dict_has_the_bias_and_not_the_counts():
    assert set(router_of(UPDATED).state_dict()) == {"weight", "bias"}
    assert set(router_of(RouterSpec(linear_bias=True)).state_dict()) == {"weight", "linear_bias"}
    assert set(router_of(RouterSpec()).state_dict()) == {"weight"}


def test_state_that_conversion_left_on_the_meta_device_starts_at_zero():
    router = Router(D, E, UPDATED.model_copy(update={"linear_bias": True}), device="meta")
    router.weight = nn.Parameter(torch.randn(E, D))
    router.materialise()
    for tensor in (router.linear_bias, router.bias, router.tokens_per_expert):
        assert tensor.device.type == "cpu"
        assert torch.count_nonzero(tensor) == 0
    assert isinstance(router.linear_bias, nn.Parameter)
    assert not any(t.is_meta for t in router.state_dict().values())


def test_a_spec_that_does_not_fit_the_experts_is_refused():
    with pytest.raises(errors.TopKTooLarge, match=r"nn\.Router"):
        Router(D, 2, RouterSpec(top_k=3))
    with pytest.raises(errors.NotDivisible, match="groups=3"):
        Router(D, E, RouterSpec(groups=3))
    with pytest.raises(errors.SpecConflict, match=r"nn\.Router does not say how many .*capacity_factor"):
        Router(D, E, RouterSpec(choice="expert", normalize=None))


def test_prints_what_it_is():
    text = repr(router_of(SPECS["DeepSeek-V3"]))
    for part in ("6 -> 8, top_k=4, sigmoid/L1, scale=2.5", "groups=2 of 4 by top2", "bias_update_rate=0.001"):
        assert part in text
