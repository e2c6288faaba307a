"""Demands on a plan."""

from __future__ import annotations

import pytest
from plan_samples import large, lowered, report, skipped, small

from moepass import errors
from moepass.explain.require import parse, unmet
from moepass.lowering.registry import lowerings

PLAN = report(lowered("layers.0.mlp", small()), lowered("layers.0.mlp", large()), skipped("layers.1.side"))


def failures(*demands: str) -> list[str]:
    return unmet(PLAN, [parse(text, lowerings()) for text in demands])


def test_a_demand_holds_for_every_range_of_every_site_that_fits():
    assert failures("layers.0.*=dense|grouped", "*.side=skipped", "*.mlp=lowered") == []
    assert failures("layers.0.mlp=dense") == ["layers.0.mlp=dense: layers.0.mlp, T >= 512, infer: grouped"]


def test_what_was_left_alone_is_named_with_its_reason():
    assert failures("*=lowered") == ["*=lowered: layers.1.side, any T: skipped hidden_escapes"]


def test_a_site_that_is_not_there_fails_the_demand():
    (line,) = failures("model.*=grouped")
    assert "no site has such a name" in line
    assert "layers.0.mlp" in line


@pytest.mark.parametrize("text", ["grouped", "=grouped", "a=", "a=fast|grouped", "a=grouped|"])
def test_a_demand_that_cannot_be_read_is_refused(text):
    with pytest.raises(errors.BadOption, match="--require"):
        parse(text, lowerings())
