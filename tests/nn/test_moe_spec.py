"""``nn.MoE`` against the float64 reference over random specs: outputs and the gradient of every parameter and input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import moepass
from moepass import reference
from moepass.nn import MoE
from moepass.spec import DispatchSpec, ExpertSpec, LossSpec, MoESpec, RouterSpec

D, HIDDEN = 6, 5


@st.composite
def routers(draw, E):
    if draw(st.integers(0, 5)) == 0:
        score, scale = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])), draw(st.sampled_from([1.0, 2.5]))
        on = draw(st.sampled_from(["output", "input"]))
        return RouterSpec(
            choice="expert", top_k=draw(st.integers(1, E)), normalize=None, score=score, scale=scale, weight_on=on
        )
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if E % g == 0 and E // g >= 2] or [1]))
    kept = draw(st.integers(1, groups))
    k = draw(st.integers(1, kept * (E // groups)))
    saturates = k == 1
    group_scores = ["top2", "max"] + (["top_k_per_group"] if k % kept == 0 else [])
    bias, normalize = draw(st.booleans()), None if saturates else draw(st.sampled_from([None, 1.0, 2.0]))
    score = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]))
    return RouterSpec(
        top_k=k,
        score=score,
        score_first=saturates or draw(st.booleans()),
        normalize=normalize,
        normalize_eps=0.0 if normalize is None else draw(st.sampled_from([0.0, 1e-3])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        bias=bias,
        bias_update_rate=draw(st.sampled_from([0.0, 1e-3])) if bias else 0.0,
        linear_bias=draw(st.booleans()),
        groups=groups,
        kept_groups=kept,
        group_score=draw(st.sampled_from(group_scores)),
        jitter=draw(st.sampled_from([0.0, 0.1])),
        assignment=draw(st.sampled_from(["learned"] * 4 + ["uniform"])),
        weight_on=draw(st.sampled_from(["output", "output", "input"])),
    )


@st.composite
def expert_specs(draw, E):
    shared = draw(st.sampled_from([None, 3]))
    return ExpertSpec(
        num_experts=E,
        intermediate_size=HIDDEN,
        activation=draw(st.sampled_from(["swiglu", "gelu", "relu2", "gpt_oss"])),
        bias_in=draw(st.booleans()),
        bias_out=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.5])),
        output_scale=draw(st.booleans()),
        latent_size=draw(st.sampled_from([None, None, 4])),
        shared_intermediate_size=shared,
        shared_combine=draw(st.sampled_from(["sum", "gated", "mixed"])) if shared else "sum",
    )


@st.composite
def dispatch_specs(draw, S, expert_choice):
    cf = draw(st.sampled_from([0.3, 0.75, 1.1, 3.0])) if expert_choice or draw(st.booleans()) else None
    scope = "batch" if cf is None else draw(st.sampled_from(["batch", "sequence", "subsequence"]))
    lengths = [n for n in range(1, S + 1) if S % n == 0] or [1]
    return DispatchSpec(
        capacity_factor=cf,
        drop_policy="position" if expert_choice else draw(st.sampled_from(["position", "probability"])),
        scope=scope,
        subsequence_length=draw(st.sampled_from(lengths)) if scope == "subsequence" else None,
        ragged_buffer_factor=None if expert_choice else draw(st.sampled_from([None, None, 0.6])),
    )


@st.composite
def cases(draw):
    """A spec, a shape ``(B, S)`` of tokens, and whether some of them are masked."""
    E = draw(st.sampled_from([1, 2, 4, 6]))
    B, S = draw(st.sampled_from([(1, 1), (2, 4), (3, 6), (1, 13), (0, 3), (2, 0)]))
    router = draw(routers(E))
    dispatch = draw(dispatch_specs(S, router.choice == "expert"))
    return MoESpec(router=router, experts=draw(expert_specs(E)), dispatch=dispatch), (B, S), draw(st.booleans())


def module(spec, dtype=torch.float64):
    moe = MoE(D, spec, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    moe.reset_parameters(generator)
    with torch.no_grad():
        moe.router.weight.mul_(20)  # decisive: some experts get no token
        for tensor in (*moe.parameters(), *moe.buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():  # biases and scales
                tensor.uniform_(0.2, 1.5, generator=generator)
    return moe.eval()


def by_reference(moe, x, mask):
    parameters = dict(moe.named_parameters())
    shared = None
    if moe.shared_in is not None:
        shared = reference.SharedWeights(moe.shared_in, moe.shared_out, gate=moe.shared_gate)
    extras = reference.Extras(
        bias=moe.router.bias,
        output_scale=moe.output_scale,
        shared=shared,
        latent_in=moe.latent_in,
        latent_out=moe.latent_out,
        mask=mask,
        sequences=tuple(x.shape[:2]),
    )
    logits = F.linear(x, moe.router.weight, parameters.get("router.linear_bias"))
    weights = reference.ExpertWeights(moe.w_in, moe.w_out, moe.b_in, moe.b_out)
    return reference.moe(x, logits, weights, moe.spec, extras)


def output_and_gradients(y, moe, x):
    weight = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view_as(y)
    return y, torch.autograd.grad((y * weight).sum(), [x, *moe.parameters()], materialize_grads=True)


def inputs(B, S, masked, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, S, D, generator=generator, dtype=dtype).requires_grad_()
    return x, (torch.rand(B, S, generator=generator) < 0.7 if masked else None)


@settings(max_examples=150)
@given(cases())
def test_outputs_and_all_gradients_equal_the_reference(case):
    spec, (B, S), masked = case
    moe = module(spec)
    x, mask = inputs(B, S, masked)
    y, grads = output_and_gradients(moe(x, mask), moe, x)
    expected, expected_grads = output_and_gradients(by_reference(moe, x, mask), moe, x)
    torch.testing.assert_close(y, expected)
    for name, grad, expected_grad in zip(["x", *dict(moe.named_parameters())], grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, msg=lambda text, name=name: f"{name}: {text}")


EVERYTHING = {
    "everything by tokens": MoESpec(
        router=RouterSpec(top_k=2, score="sigmoid", bias=True, linear_bias=True, groups=2, kept_groups=1, scale=2.5),
        experts=ExpertSpec(
            num_experts=4, intermediate_size=HIDDEN, activation="swiglu", bias_in=True, bias_out=True,
            output_scale=True, latent_size=4, shared_intermediate_size=3, shared_combine="gated",
        ),
        dispatch=DispatchSpec(capacity_factor=0.75, scope="sequence", drop_policy="probability"),
    ),
    "weights on inputs": MoESpec(
        router=RouterSpec(top_k=2, score="sigmoid", score_first=False, normalize=None, weight_on="input"),
        experts=ExpertSpec(
            num_experts=4, intermediate_size=HIDDEN, activation="swiglu", shared_intermediate_size=3,
            shared_combine="mixed",
        ),
        dispatch=DispatchSpec(capacity_factor=0.8),
    ),
    "experts choose": MoESpec(
        router=RouterSpec(top_k=2, normalize=None, choice="expert"),
        experts=ExpertSpec(num_experts=4, intermediate_size=HIDDEN, activation="gelu", output_scale=True),
        dispatch=DispatchSpec(capacity_factor=0.75, scope="sequence"),
    ),
    "a ragged buffer": MoESpec(
        experts=ExpertSpec(num_experts=4, intermediate_size=HIDDEN, activation="swiglu"),
        dispatch=DispatchSpec(ragged_buffer_factor=0.7),
    ),
}  # fmt: skip


def compiled_equals_eager(spec, backend, options=None):
    torch.compiler.reset()
    moe = module(spec, torch.float32)
    forward = torch.compile(moe, backend=backend, fullgraph=True, dynamic=True, options=options)
    for B, S in ((2, 9), (3, 4), (5, 8)):  # no size that a width has too, which Dynamo would take for the same
        x, mask = inputs(B, S, True, torch.float32)
        y, grads = output_and_gradients(forward(x, mask), moe, x)
        expected, expected_grads = output_and_gradients(moe(x, mask), moe, x)
        torch.testing.assert_close(y, expected)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", EVERYTHING)
def test_compiles_in_one_graph_for_many_shapes(name):
    torch._dynamo.utils.counters.clear()
    compiled_equals_eager(EVERYTHING[name], "aot_eager")


@pytest.mark.parametrize("name", ["everything by tokens", "experts choose"])
def test_runs_under_our_own_backend(name):
    torch._dynamo.utils.counters.clear()
    compiled_equals_eager(EVERYTHING[name], "moepass", {"inner": "aot_eager", "convert": False})


@pytest.mark.parametrize("name", EVERYTHING)
def test_expert_without_tokens_gets_zero_gradient_and_no_nan(name):
    moe = module(EVERYTHING[name])
    x, _ = inputs(2, 4, False)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 0] = True  # one token: most experts have none
    _, grads = output_and_gradients(moe(x, mask), moe, x)
    by_name = dict(zip([n for n, _ in moe.named_parameters()], grads[1:], strict=True))
    assert all(grad.isfinite().all() for grad in grads)
    busy = {e for e in range(4) if by_name["w_in"][e].abs().max() > 0}
    assert len(busy) <= (4 if EVERYTHING[name].router.choice == "expert" else 2)


def test_what_a_masked_token_holds_reaches_nobody():
    alone = ExpertSpec(num_experts=4, intermediate_size=HIDDEN, activation="swiglu", output_scale=True)
    on_inputs = EVERYTHING["weights on inputs"].model_copy(update={"experts": alone})
    for spec in (on_inputs, EVERYTHING["a ragged buffer"], EVERYTHING["experts choose"]):
        moe = module(spec)
        x, mask = inputs(2, 4, True)
        huge = torch.where(mask[..., None], x, 1e30).detach()
        torch.testing.assert_close(moe(huge, mask)[mask], moe(x, mask)[mask])
        assert torch.count_nonzero(moe(huge, mask)[~mask]) == 0


# --- losses of the module --------------------------------------------------------------------------------------------


def with_losses(**losses):
    spec = MoESpec(
        router=RouterSpec(top_k=2),
        experts=ExpertSpec(num_experts=4, intermediate_size=HIDDEN, activation="swiglu"),
        losses=LossSpec(**losses),
    )
    return module(spec).train()


def test_attached_and_returned_losses_have_the_same_gradient():
    x, mask = inputs(2, 4, True)
    for convention in ("olmo_core_local", "olmo_core_instance", "maxtext", "hf", "automodel", "megatron"):
        attached = with_losses(load_balance=convention, load_balance_weight=0.5, z_weight=0.25)
        returned = with_losses(load_balance=convention, load_balance_weight=0.5, z_weight=0.25, attach=False)
        y, losses = returned(x, mask, return_losses=True)
        assert set(losses) == {"load_balance", "z"}
        assert torch.equal(attached(x, mask), y)
        (y.square().sum() + losses["load_balance"] + losses["z"]).backward()
        attached(x, mask).square().sum().backward()
        for p, q in zip(attached.parameters(), returned.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        without = with_losses()
        without(x, mask).square().sum().backward()
        assert (without.router.weight.grad - attached.router.weight.grad).abs().max() > 1e-3


def test_module_losses_are_the_functions_of_its_routing():
    from moepass.nn.losses import load_balancing_loss, router_z_loss

    x, mask = inputs(3, 5, True)
    moe = with_losses(load_balance="olmo_core_instance", load_balance_weight=0.5, z_weight=2.0)
    logits = x.reshape(-1, D) @ moe.router.weight.T
    index = torch.topk(logits, 2).indices
    _, losses = moe(x, mask, return_losses=True, loss_div_factor=40.0)
    expected = load_balancing_loss(
        logits.softmax(-1), index, "olmo_core_instance", sequences=(3, 5), mask=mask, loss_div_factor=40.0
    )
    torch.testing.assert_close(losses["load_balance"], 0.5 * expected)
    torch.testing.assert_close(losses["z"], 2.0 * router_z_loss(logits, mask=mask, loss_div_factor=40.0))


def test_evaluation_attaches_nothing_and_a_block_without_losses_returns_none():
    x, _ = inputs(2, 4, False)
    moe = with_losses(z_weight=1e6).eval()
    plain = with_losses().eval()
    a, b = (torch.autograd.grad(m(x).sum(), m.router.weight)[0] for m in (moe, plain))
    assert torch.equal(a, b)
    assert plain(x, return_losses=True)[1] == {}


@pytest.mark.parametrize("backend", ["aot_eager", "moepass"])
def test_attached_losses_and_metrics_compile_in_one_graph_under_checkpointing(backend):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    options = {"options": {"inner": "aot_eager"}} if backend == "moepass" else {}
    moe, eager = (with_losses(load_balance="maxtext", load_balance_weight=0.5, z_weight=0.25) for _ in range(2))
    moe.record_metrics()

    def forward(x, mask):
        return checkpoint(moe, x, mask, use_reentrant=False)

    compiled = torch.compile(forward, backend=backend, fullgraph=True, dynamic=True, **options)
    for B, S in ((2, 9), (3, 4), (5, 8)):
        x, mask = inputs(B, S, True)
        y, grads = output_and_gradients(compiled(x, mask), moe, x)
        expected, expected_grads = output_and_gradients(eager(x, mask), eager, x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grads, expected_grads)
        assert moe.metrics().tokens_per_expert.sum() == 2 * mask.sum()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_our_backend_leaves_the_shared_expert_dense():
    torch.compiler.reset()
    moe = module(EVERYTHING["everything by tokens"], torch.float32)
    x, mask = inputs(2, 9, True, torch.float32)
    compiled = torch.compile(moe, backend="moepass", fullgraph=True, options={"inner": "aot_eager"})
    torch.testing.assert_close(compiled(x, mask), moe(x, mask))
    assert [site.kind for site in moepass.last_plan().sites] == ["moe"]


def test_builds_from_its_spec():
    moe = EVERYTHING["experts choose"].build(D, dtype=torch.bfloat16)
    assert isinstance(moe, MoE)
    assert moe.w_in.dtype == torch.bfloat16


def test_narrow_blocks_with_everything_stay_close_to_float64():
    for spec in EVERYTHING.values():
        moe, wide = module(spec, torch.bfloat16), module(spec)
        wide.load_state_dict(moe.state_dict())
        x, mask = inputs(4, 8, True, torch.bfloat16)
        y = moe(x, mask)
        assert y.dtype == torch.bfloat16
        with torch.no_grad():
            expected = wide(x.double(), mask)
        close = (y - expected).abs().amax(-1) < 0.05 * expected.abs().max()
        assert close.float().mean() > 0.9  # a near tie may fall the other way
