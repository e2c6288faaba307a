"""The theorem table of ``reference/upcycling.md`` section 1.0: what is called exact is, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moepass import errors, pointwise, reference
from moepass.spec import DispatchSpec, ExpertSpec, InitSpec, MoESpec, RouterSpec
from moepass.upcycle.init import complete, exactness, initialise

D, WIDTH = 16, 24

ROUTERS = {
    "R1": {},
    "R1 L2": {"normalize": 2.0},
    "R2": {"score_first": False, "normalize": None},
    "R2 scaled": {"score_first": False, "normalize": None, "scale": 3.0},
    "R3": {"normalize": None},
    "R4": {"score": "sigmoid", "scale": 2.5},
    "R5": {"score": "sigmoid", "normalize": None},
}

#: (method, granularity, experts, top_k) -> routers for which step 0 is the dense function.
TABLE = {
    ("virtual_groups", 2, 8, 2): {"R1", "R1 L2", "R2", "R2 scaled", "R4"},  # one tied group: any norm is constant
    ("virtual_groups", 2, 8, 4): {"R1", "R2", "R2 scaled", "R4"},
    ("virtual_groups", 4, 8, 4): {"R1", "R1 L2", "R2", "R2 scaled", "R4"},
    ("virtual_groups", 2, 8, 8): {"R1", "R2", "R2 scaled", "R3", "R4"},
    ("virtual_groups", 1, 8, 2): {"R1", "R2", "R2 scaled", "R4"},
    ("copy", 2, 8, 2): {"R1", "R2", "R2 scaled", "R4"},
    ("copy", 2, 4, 4): {"R1", "R2", "R2 scaled", "R3", "R4"},
    ("copy+noise", 2, 8, 2): set(),
    ("drop", 2, 8, 2): set(),
    ("split", 2, 4, 4): set(ROUTERS),  # zero router: every weight is the same, and every shard differs
    ("split", 2, 4, 2): set(),
    ("cluster", 2, 4, 4): set(ROUTERS),
    ("cluster", 2, 4, 2): set(),
}


def dense_weights(activation, biases=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    n = pointwise.n_inputs(activation)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype) / D**0.5

    return draw(n * WIDTH, D), draw(D, WIDTH), draw(n * WIDTH) if biases else None, draw(D) if biases else None


def dense_output(weights, activation, x):
    w_in, w_out, b_in, b_out = weights
    return F.linear(pointwise.apply(activation, F.linear(x, w_in, b_in)), w_out, b_out)


def relative_error(spec, init, activation="swiglu", biases=True):
    """Largest difference of the upcycled block to the dense one, relative to the largest output, in float64."""
    weights = dense_weights(activation, biases)
    full = complete(spec, F=WIDTH, D=D, program=activation, init=init, bias_in=biases, bias_out=biases)
    made = initialise(*weights, full, init, "layers.0.mlp")
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 3.0
    x[0] = 0.0  # padding: every logit ties
    y = reference.moe(x, x @ made.router_weight.T, reference.ExpertWeights(*made[1:]), full)
    expected = dense_output(weights, activation, x)
    return float((y - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("case", TABLE, ids=lambda c: "-".join(map(str, c)))
def test_the_verdict_is_the_truth_for_every_router_class(case, router):
    method, granularity, experts, top_k = case
    spec = MoESpec(router=RouterSpec(top_k=top_k, **ROUTERS[router]), experts=ExpertSpec(num_experts=experts))
    init = InitSpec(method=method, granularity=granularity)
    verdict = exactness(spec, init)
    error = relative_error(spec, init)
    assert verdict.exact == (router in TABLE[case]), verdict.reason
    assert (error < 1e-12) == verdict.exact, (verdict, error)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu", "gelu", "relu2", "gelu_tanh", "gpt_oss"])
@pytest.mark.parametrize("biases", [True, False])
def test_the_default_is_exact_on_every_activation(activation, biases):
    assert relative_error(MoESpec(), InitSpec(), activation, biases) < 1e-12


@pytest.mark.parametrize("method", ["copy+noise", "drop"])
def test_without_noise_the_inexact_methods_are_copies_and_say_so(method):
    init = InitSpec(method=method, noise_std=0.0, drop_ratio=0.0)
    assert exactness(MoESpec(), init).exact
    assert relative_error(MoESpec(), init) < 1e-12


def test_capacity_that_can_drop_is_not_exact_and_capacity_that_cannot_is():
    tight, wide = (MoESpec(dispatch=DispatchSpec(capacity_factor=cf)) for cf in (1.25, 4.0))
    assert not exactness(tight, InitSpec()).exact
    assert "capacity_factor=1.25" in exactness(tight, InitSpec()).reason
    assert exactness(wide, InitSpec()).exact
    assert relative_error(wide, InitSpec()) < 1e-12


def test_virtual_groups_start_with_a_live_router_and_copies_with_a_dead_one():
    def router_gradient(method):
        init = InitSpec(method=method)
        weights = dense_weights("swiglu", biases=False)
        full = complete(MoESpec(), F=WIDTH, D=D, program="swiglu", init=init, bias_in=False, bias_out=False)
        made = initialise(*weights, full, init, "mlp")
        router = made.router_weight.clone().requires_grad_()
        x = torch.randn(64, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        y = reference.moe(x, x @ router.T, reference.ExpertWeights(*made[1:]), full)
        (grad,) = torch.autograd.grad(y.square().sum(), router)
        return float(grad.abs().max())

    assert router_gradient("virtual_groups") > 1e-3
    assert router_gradient("copy") < 1e-12


@pytest.mark.parametrize(
    ("spec", "init", "message"),
    [
        (MoESpec(router=RouterSpec(top_k=3)), InitSpec(), r"top_k=3 .* granularity=2"),
        (MoESpec(experts=ExpertSpec(num_experts=9)), InitSpec(), r"num_experts=9 .* granularity=2"),
        (MoESpec(), InitSpec(granularity=5), r"not divisible by granularity=5"),
        (MoESpec(router=RouterSpec(top_k=7), experts=ExpertSpec(num_experts=7)), InitSpec(method="split"), r"F=24"),
    ],
)
def test_counts_that_do_not_divide_are_refused_with_the_numbers(spec, init, message):
    with pytest.raises(errors.NotDivisible, match=message):
        complete(spec, F=WIDTH, D=D, program="gelu", init=init, bias_in=False, bias_out=False)


def test_a_spec_that_contradicts_the_dense_block_is_refused():
    def fill(**experts):
        spec = MoESpec(experts=ExpertSpec(**experts))
        return complete(spec, F=WIDTH, D=D, program="gelu", init=InitSpec(), bias_in=True, bias_out=False)

    with pytest.raises(errors.SpecContradictsDense, match="intermediate_size=24"):
        fill(intermediate_size=24)
    with pytest.raises(errors.SpecContradictsDense, match="activation"):
        fill(activation="relu")
    full = fill(intermediate_size=12, activation="gelu", bias_out=True)
    assert (full.experts.bias_in, full.experts.bias_out) == (True, True)
    assert MoESpec.model_validate_json(full.model_dump_json()) == full


def test_a_router_scale_of_zero_is_refused():
    with pytest.raises(errors.BadOption, match="silences"):
        exactness(MoESpec(router=RouterSpec(scale=0.0)), InitSpec())


NEW_ROUTERS = {
    "sqrtsoftplus, normalised": ({"score": "sqrtsoftplus"}, True),
    "sqrtsoftplus": ({"score": "sqrtsoftplus", "normalize": None}, False),
    "DeepSeek-V3": ({"score": "sigmoid", "normalize_eps": 1e-20, "scale": 2.5, "bias": True}, True),
    "a large epsilon": ({"normalize_eps": 0.1}, False),
    "groups that hold whole virtual groups": ({"groups": 4, "kept_groups": 2, "group_score": "max"}, True),
    "groups that cut virtual groups": ({"groups": 8, "kept_groups": 4, "group_score": "max"}, False),
    "uniform": ({"assignment": "uniform"}, True),
    "random": ({"assignment": "random"}, False),
    "weights on the input": ({"weight_on": "input"}, False),
    "expert choice": ({"choice": "expert", "normalize": None, "score": "sigmoid"}, False),
}


@pytest.mark.parametrize("name", NEW_ROUTERS)
def test_the_verdict_is_the_truth_for_every_kind_of_routing(name):
    from moepass.nn import routing

    fields, exact = NEW_ROUTERS[name]
    cut = name == "groups that cut virtual groups"
    router = RouterSpec(**({"top_k": 4, **fields}))
    dispatch = DispatchSpec(capacity_factor=1.0) if router.choice == "expert" else DispatchSpec()
    spec, init = MoESpec(router=router, experts=ExpertSpec(num_experts=8), dispatch=dispatch), InitSpec(granularity=2)
    weights = dense_weights("swiglu")
    full = complete(spec, F=WIDTH, D=D, program="swiglu", init=init, bias_in=True, bias_out=True)
    made = initialise(*weights, full, init, "mlp")
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 3.0
    drawn = routing.random(64, 4, 8, made.router_weight) if router.assignment == "random" else None
    experts = reference.ExpertWeights(*made[1:])
    y = reference.moe(x, x @ made.router_weight.T, experts, full, reference.Extras(index_TK=drawn))
    expected = dense_output(weights, "swiglu", x)
    error = float((y - expected).abs().max() / expected.abs().max())
    verdict = exactness(spec, init)
    assert verdict.exact == exact, verdict.reason
    assert cut or (error < 1e-12) == exact, (verdict, error)  # tied rows: cut groups may still choose whole ones


@pytest.mark.parametrize("dispatch", [{"ragged_buffer_factor": 0.5}, {"capacity_factor": 1.0, "scope": "sequence"}])
def test_dispatch_that_can_drop_is_not_exact(dispatch):
    verdict = exactness(MoESpec(dispatch=DispatchSpec(**dispatch)), InitSpec())
    assert not verdict.exact
    assert next(iter(dispatch)) in verdict.reason
    assert exactness(MoESpec(dispatch=DispatchSpec(ragged_buffer_factor=1.0)), InitSpec()).exact


def test_made_up_weights_are_exact_only_where_they_are_even():
    def verdict(method, top_k, noise):
        router = RouterSpec(top_k=top_k, assignment="balanced", assignment_noise=noise)
        return exactness(MoESpec(router=router), InitSpec(method=method)).exact

    assert verdict("virtual_groups", 2, 0.0)
    assert not verdict("virtual_groups", 2, 0.5)
    assert verdict("copy", 2, 0.5)
    assert verdict("split", 8, 0.0)
    assert not verdict("split", 8, 0.5)


@pytest.mark.parametrize("field", ["latent_size", "shared_intermediate_size"])
def test_parts_that_a_dense_block_has_no_weights_for_are_refused(field):
    spec = MoESpec(experts=ExpertSpec(**{field: 12}))
    with pytest.raises(errors.NotFromDense, match=rf"ExpertSpec.{field}=12 .* layers.0.mlp"):
        complete(
            spec, F=24, D=D, program="swiglu", init=InitSpec(), bias_in=False, bias_out=False, where="layers.0.mlp"
        )
