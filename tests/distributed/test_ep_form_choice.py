"""``parallelize(form="auto")``: the planner's choice, from facts that every rank has."""

from __future__ import annotations

import pytest
from torch import nn

from moepass.lowering.plan import Workload
from moepass.nn import MoE
from moepass.parallel import choice
from moepass.spec import ExpertSpec, MoESpec, RouterSpec

WORK = Workload(tokens=256, D=1024, F=512, E=16, K=8, n=2)


@pytest.fixture
def block() -> nn.Module:
    experts = ExpertSpec(num_experts=8, intermediate_size=16, activation="swiglu")
    return MoE(8, MoESpec(router=RouterSpec(top_k=2), experts=experts))


def test_few_ranks_that_only_infer_gather_tokens_and_many_ranks_exchange_rows():
    """K=8: a token goes to one other rank once, instead of four of its rows."""
    assert choice.cheaper(WORK, 2) == "all_gather"
    assert choice.cheaper(WORK.model_copy(update={"K": 1, "tokens": 4096}), 16) == "all_to_all"


def test_training_keeps_to_the_form_that_saves_less():
    assert choice.cheaper(WORK.model_copy(update={"train": True}), 4) == "all_to_all"


def test_the_choice_does_not_depend_on_what_was_measured_here(monkeypatch):
    monkeypatch.setattr("moepass.lowering.links.calibrated", lambda *_: pytest.fail("asked for a calibrated link"))
    monkeypatch.setattr("moepass.lowering.hardware.calibrated", lambda *_: pytest.fail("asked for a profile"))
    choice.cheaper(WORK, 2)


@pytest.mark.parametrize(
    ("dims", "factor", "form"),
    [(("node", "ep"), None, "hierarchical"), (("ep",), 1.5, "all_to_all"), (("ep",), None, "all_to_all")],
)
def test_forms_that_alone_can_serve_are_taken_without_a_price(block, dims, factor, form):
    """The last has no mesh: ``parallel.checks`` says so."""
    found = choice.planned_form([block], None, dims, tokens=0, buffer_factor=factor, train=True)
    assert found == form


def test_a_block_is_described_as_the_planner_sees_it(block):
    work = choice._workload(block, 64, "cpu", True)
    assert (work.tokens, work.D, work.F, work.E, work.K, work.n, work.train) == (64, 8, 16, 8, 2, 2, True)


def test_chunks_are_taken_where_the_price_says_that_they_pay():
    many = Workload(tokens=16384, D=7168, F=2048, E=256, K=8, n=2, dtype="bfloat16", device="cuda")
    assert choice.chunks("all_to_all", many, [8]) > 1
    assert choice.chunks("all_to_all", many.model_copy(update={"tokens": 64}), [8]) == 1
    assert choice.chunks("all_to_all", many.model_copy(update={"device": "cpu", "dtype": "float32"}), [8]) == 1
    assert choice.chunks("hierarchical", many, [4, 8]) > 1
