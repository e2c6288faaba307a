"""Specs are frozen values: comparable, hashable, serialisable; contradictions are refused with our own errors."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moepass import errors
from moepass.spec import DispatchSpec, ExpertSpec, InitSpec, MoESpec, RouterSpec, capacity

EXAMPLES = [
    MoESpec(),
    MoESpec(router=RouterSpec(top_k=1, normalize=None)),
    MoESpec(router=RouterSpec(score="sigmoid", score_first=False, normalize=2.0, scale=2.5)),
    MoESpec(experts=ExpertSpec(num_experts=64, intermediate_size=128, activation="swiglu", bias_in=True, dropout=0.1)),
    MoESpec(dispatch=DispatchSpec(capacity_factor=1.25, drop_policy="probability")),
]


@pytest.mark.parametrize("part", [MoESpec(), RouterSpec(), ExpertSpec(), DispatchSpec(), InitSpec()])
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
    assert RouterSpec().digest == "6b293d2db125"


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
        (InitSpec, {"method": "copies"}),
        (InitSpec, {"granularity": 0}),
        (InitSpec, {"drop_ratio": 1.5}),
        (MoESpec, {"expert": ExpertSpec()}),
    ],
)
def test_a_value_out_of_range_or_an_unknown_field_is_refused(part, kwargs):
    with pytest.raises(ValidationError, match=next(iter(kwargs))):
        part(**kwargs)


def test_dropping_tokens_is_having_a_capacity():
    assert not DispatchSpec().drops_tokens
    assert DispatchSpec(capacity_factor=1.0).drops_tokens


def test_capacity_is_rounded_up_and_at_least_one():
    assert capacity(1.0, tokens=16, top_k=2, num_experts=8) == 4
    assert capacity(1.25, tokens=16, top_k=2, num_experts=8) == 5
    assert capacity(1.1, tokens=16, top_k=2, num_experts=8) == 5
    assert capacity(0.01, tokens=1, top_k=1, num_experts=64) == 1


@given(st.floats(1.0, 4.0), st.integers(1, 5000), st.integers(1, 8), st.integers(1, 64))
def test_a_capacity_factor_of_at_least_one_has_room_for_all_rows(factor, tokens, top_k, experts):
    assert capacity(factor, tokens, top_k, experts) * experts >= tokens * top_k
