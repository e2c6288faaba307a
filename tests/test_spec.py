"""Specs are frozen values: comparable, hashable, serialisable; contradictions are refused with our own errors."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moepass import errors
from moepass.spec import (
    DispatchSpec,
    ExpertSpec,
    InitSpec,
    LossSpec,
    MoESpec,
    RouterSpec,
    beyond_one_line,
    capacity,
    check_one_line,
)

GROUPS_OF_8 = {"groups": 4, "kept_groups": 2}
EXPERT_CHOICE = RouterSpec(choice="expert", normalize=None)

EXAMPLES = [
    MoESpec(),
    MoESpec(router=RouterSpec(top_k=1, normalize=None)),
    MoESpec(router=RouterSpec(score="sigmoid", score_first=False, normalize=2.0, scale=2.5)),
    MoESpec(experts=ExpertSpec(num_experts=64, intermediate_size=128, activation="swiglu", bias_in=True, dropout=0.1)),
    MoESpec(dispatch=DispatchSpec(capacity_factor=1.25, drop_policy="probability")),
    MoESpec(router=RouterSpec(top_k=4, score="sigmoid", bias=True, bias_update_rate=1e-3, normalize_eps=1e-20)),
    MoESpec(router=RouterSpec(top_k=4, **GROUPS_OF_8), losses=LossSpec(load_balance="megatron", z_weight=1e-3)),
    MoESpec(router=EXPERT_CHOICE, dispatch=DispatchSpec(capacity_factor=1.0, scope="sequence")),
    MoESpec(experts=ExpertSpec(shared_intermediate_size=16, shared_combine="gated", latent_size=4, output_scale=True)),
    MoESpec(router=RouterSpec(top_k=1, normalize=None, score="sigmoid", weight_on="input")),  # Llama-4
]


@pytest.mark.parametrize("part", [MoESpec(), RouterSpec(), ExpertSpec(), DispatchSpec(), LossSpec(), InitSpec()])
def test_no_field_can_be_assigned(part):
    for name in type(part).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, getattr(part, name))


@pytest.mark.parametrize("spec", EXAMPLES)
def test_a_spec_survives_json_pickle_and_copy_as_an_equal_value(spec):
    for other in (
        MoESpec.model_validate_json(spec.model_dump_json()),
        pickle.loads(pickle.dumps(spec)),
        copy.deepcopy(spec),
    ):
        assert other == spec
        assert hash(other) == hash(spec)
        assert other.digest == spec.digest


def test_the_digest_tells_specs_apart_and_is_the_same_in_every_process():
    assert len({spec.digest for spec in EXAMPLES}) == len(EXAMPLES)
    assert RouterSpec().digest == "245cda1b0d6f"


def test_equal_activations_are_equal_specs():
    spelled = ExpertSpec(activation="u*(g*sigmoid(g))")
    assert spelled == ExpertSpec(activation="swiglu")
    assert spelled.digest == ExpertSpec(activation="swiglu").digest
    assert spelled.n_projections == 2
    assert ExpertSpec(activation="gelu").n_projections == 1


def test_a_spec_without_activation_has_no_projections_yet():
    with pytest.raises(errors.BadActivation, match="none yet"):
        _ = ExpertSpec().n_projections


@pytest.mark.parametrize(
    ("kwargs", "alive"),
    [
        ({"top_k": 1}, False),  # the renormalised weight is 1 whatever the logits
        ({"top_k": 1, "normalize": 2.0}, False),
        ({"top_k": 1, "normalize": None}, True),
        ({"top_k": 1, "normalize": None, "score_first": False}, False),  # the softmax of one logit is 1
        ({"top_k": 1, "normalize": None, "score_first": False, "score": "sigmoid"}, True),
        ({"top_k": 1, "normalize": 1.0, "score": "sigmoid"}, False),
        ({"top_k": 1, "normalize": None, "score": "sigmoid", "weight_on": "input"}, True),
        ({"top_k": 1, "normalize": 1.0, "normalize_eps": 1e-20}, False),
        ({"top_k": 2}, True),
    ],
)
def test_a_router_that_cannot_learn_is_refused_unwrapped(kwargs, alive):
    if alive:
        assert RouterSpec(**kwargs).top_k == kwargs["top_k"]
        return
    with pytest.raises(errors.DeadRouter) as caught:
        RouterSpec(**kwargs)
    assert caught.type is errors.DeadRouter


def test_more_choices_than_experts_are_refused_unwrapped():
    with pytest.raises(errors.TopKTooLarge, match="top_k=9 exceeds the 8 experts") as caught:
        MoESpec(router=RouterSpec(top_k=9))
    assert caught.type is errors.TopKTooLarge
    assert MoESpec(router=RouterSpec(top_k=8)).router.top_k == 8


def test_a_dead_router_inside_json_is_refused_unwrapped_too():
    with pytest.raises(errors.DeadRouter):
        MoESpec.model_validate_json('{"router": {"top_k": 1}}')


def test_an_unknown_activation_is_refused_unwrapped():
    with pytest.raises(errors.BadActivation, match="swigloo"):
        ExpertSpec(activation="swigloo")


@pytest.mark.parametrize(
    ("part", "kwargs"),
    [
        (RouterSpec, {"top_k": 0}),
        (RouterSpec, {"normalize": 0.0}),
        (RouterSpec, {"score": "relu"}),
        (RouterSpec, {"topk": 2}),
        (ExpertSpec, {"num_experts": 0}),
        (ExpertSpec, {"intermediate_size": 0}),
        (ExpertSpec, {"dropout": 1.0}),
        (DispatchSpec, {"capacity_factor": 0.0}),
        (DispatchSpec, {"drop_policy": "random"}),
        (DispatchSpec, {"ragged_buffer_factor": 0.0}),
        (RouterSpec, {"jitter": 1.0}),
        (RouterSpec, {"groups": 0}),
        (RouterSpec, {"normalize_eps": -1e-9}),
        (RouterSpec, {"bias_update_rate": -1e-3}),
        (RouterSpec, {"assignment_noise": 1.5}),
        (RouterSpec, {"weight_on": "both"}),
        (ExpertSpec, {"latent_size": 0}),
        (ExpertSpec, {"shared_combine": "mean"}),
        (LossSpec, {"load_balance": "switch"}),
        (LossSpec, {"z_weight": -1.0}),
        (InitSpec, {"method": "copies"}),
        (InitSpec, {"granularity": 0}),
        (InitSpec, {"drop_ratio": 1.5}),
        (MoESpec, {"expert": ExpertSpec()}),
    ],
)
def test_a_value_out_of_range_or_an_unknown_field_is_refused(part, kwargs):
    with pytest.raises(ValidationError, match=next(iter(kwargs))):
        part(**kwargs)


def test_dropping_tokens_is_having_a_capacity_or_a_short_buffer():
    assert not DispatchSpec().drops_tokens
    assert DispatchSpec(capacity_factor=1.0).drops_tokens
    assert DispatchSpec(ragged_buffer_factor=1.5).drops_tokens


CONTRADICTIONS = {
    "an epsilon without a norm": (lambda: RouterSpec(normalize=None, normalize_eps=1e-20), "normalize_eps=1e-20"),
    "an update without a bias": (lambda: RouterSpec(bias_update_rate=0.1), "bias_update_rate=0.1 .*bias=True"),
    "centring without an update": (lambda: RouterSpec(bias=True, bias_centred=True), "bias_centred=True"),
    "noise of another assignment": (lambda: RouterSpec(assignment="random", assignment_noise=0.1), "'balanced'"),
    "more groups kept than there are": (lambda: RouterSpec(groups=2, kept_groups=3), "kept_groups=3 .*groups=2"),
    "experts choose, weights are normalised": (lambda: RouterSpec(choice="expert"), "normalize=1.0 .*None"),
    "experts choose, with a bias": (lambda: RouterSpec(choice="expert", normalize=None, bias=True), "bias=True"),
    "experts choose, in groups": (lambda: RouterSpec(choice="expert", normalize=None, groups=2), "groups=2"),
    "experts choose, scores later": (
        lambda: RouterSpec(choice="expert", normalize=None, score_first=False),
        "score_first=False",
    ),
    "experts choose, nobody says how many": (lambda: MoESpec(router=EXPERT_CHOICE), "capacity_factor"),
    "experts choose, and rows are dropped": (
        lambda: MoESpec(router=EXPERT_CHOICE, dispatch=DispatchSpec(capacity_factor=1.0, ragged_buffer_factor=1.0)),
        "ragged_buffer_factor=1.0",
    ),
    "experts choose, and are balanced": (
        lambda: MoESpec(
            router=EXPERT_CHOICE, dispatch=DispatchSpec(capacity_factor=1.0), losses=LossSpec(load_balance="hf")
        ),
        "load_balance='hf'",
    ),
    "too few experts in the kept groups": (
        lambda: MoESpec(router=RouterSpec(top_k=5, **GROUPS_OF_8)),
        "top_k=5 of MoESpec exceeds the 4 experts",
    ),
    "two best scores of a group of one": (
        lambda: MoESpec(router=RouterSpec(groups=8, kept_groups=2)),
        "group_score='top2' .* has 1 expert;",
    ),
    "a scope of nothing": (lambda: DispatchSpec(scope="sequence"), "scope='sequence' .*capacity_factor"),
    "a length without its scope": (lambda: DispatchSpec(capacity_factor=1.0, subsequence_length=4), "length=4"),
    "a scope without its length": (
        lambda: DispatchSpec(capacity_factor=1.0, scope="subsequence"),
        "subsequence_length",
    ),
    "a gate on nothing": (lambda: ExpertSpec(shared_combine="gated"), "shared_combine='gated'"),
    "a coefficient without a loss": (lambda: LossSpec(load_balance_weight=0.1), "load_balance_weight=0.1"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_fields_that_contradict_each_other_are_refused_unwrapped(case):
    build, text = CONTRADICTIONS[case]
    with pytest.raises(errors.SpecConflict, match=text) as caught:
        build()
    assert caught.type is errors.SpecConflict


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: MoESpec(router=RouterSpec(groups=3)), "num_experts=8 of MoESpec is not divisible by groups=3"),
        (
            lambda: RouterSpec(top_k=3, groups=4, kept_groups=2, group_score="top_k_per_group"),
            "top_k=3 of RouterSpec is not divisible by kept_groups=2",
        ),
    ],
)
def test_counts_that_do_not_divide_are_refused_unwrapped(build, text):
    with pytest.raises(errors.NotDivisible, match=text):
        build()


def test_windows_are_where_capacity_is_counted():
    assert DispatchSpec().windows(12, None) == (1, 12)
    assert DispatchSpec(capacity_factor=1.0, scope="sequence").windows(12, (3, 4)) == (3, 4)
    cut = DispatchSpec(capacity_factor=1.0, scope="subsequence", subsequence_length=2)
    assert cut.windows(12, (3, 4)) == (6, 2)
    with pytest.raises(errors.NoSequences, match="scope='subsequence' of here"):
        cut.windows(12, None, "here")
    with pytest.raises(errors.NotDivisible, match="sequence length=3"):
        cut.windows(12, (4, 3))


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (MoESpec(), None),
        (MoESpec(router=RouterSpec(top_k=3, score="sqrtsoftplus", scale=2.0)), None),
        (MoESpec(dispatch=DispatchSpec(capacity_factor=1.0, drop_policy="probability")), None),
        (MoESpec(router=RouterSpec(bias=True)), "router.bias"),
        (MoESpec(router=RouterSpec(jitter=0.1)), "router.jitter"),
        (MoESpec(router=RouterSpec(normalize_eps=1e-20)), "router.normalize_eps"),
        (MoESpec(router=RouterSpec(assignment="uniform")), "router.assignment"),
        (MoESpec(experts=ExpertSpec(output_scale=True)), "experts.output_scale"),
        (MoESpec(experts=ExpertSpec(shared_intermediate_size=4)), "experts.shared_intermediate_size"),
        (MoESpec(dispatch=DispatchSpec(capacity_factor=1.0, scope="sequence")), "dispatch.scope"),
        (MoESpec(dispatch=DispatchSpec(ragged_buffer_factor=1.0)), "dispatch.ragged_buffer_factor"),
        (MoESpec(losses=LossSpec(z_weight=1e-3)), "losses.z_weight"),
    ],
)
def test_the_one_line_form_refuses_by_name_what_its_ops_cannot_say(spec, field):
    assert beyond_one_line(spec) == field
    if field is None:
        check_one_line(spec, "mlp")
        return
    with pytest.raises(errors.NotInOneLine, match=f"{field}=.* the place of mlp; use moepass.convert"):
        check_one_line(spec, "mlp")


def test_a_spec_builds_its_module():
    spec = MoESpec(experts=ExpertSpec(num_experts=4, intermediate_size=6, activation="swiglu"))
    moe = spec.build(8, device="meta")
    assert (type(moe).__name__, moe.spec, moe.w_in.shape) == ("MoE", spec, (4, 12, 8))


def test_capacity_is_rounded_up_and_at_least_one():
    assert capacity(1.0, tokens=16, top_k=2, num_experts=8) == 4
    assert capacity(1.25, tokens=16, top_k=2, num_experts=8) == 5
    assert capacity(1.1, tokens=16, top_k=2, num_experts=8) == 5
    assert capacity(0.01, tokens=1, top_k=1, num_experts=64) == 1


@given(st.floats(1.0, 4.0), st.integers(1, 5000), st.integers(1, 8), st.integers(1, 64))
def test_a_capacity_factor_of_at_least_one_has_room_for_all_rows(factor, tokens, top_k, experts):
    assert capacity(factor, tokens, top_k, experts) * experts >= tokens * top_k
