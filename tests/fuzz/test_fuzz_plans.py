"""Random damage to plan files: read as a plan or refused as none; replayed, they never change a number."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import fuzzing
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import D, Net, fresh  # noqa: F401 -- fresh is a fixture

import moepass
from moepass import _compat, errors
from moepass.explain.diff import diff
from moepass.explain.report import PlanReport

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.just([]), st.just({}),
    st.sampled_from(["grouped", "dense", "capacity", "gathered", "lowered", "skipped", "__import__('os')", "../x"]),
    st.lists(st.integers(), max_size=3),
)  # fmt: skip


@functools.cache
def sound() -> str:
    """The plan of a small model."""
    torch.manual_seed(0)
    return moepass.explain(Net(1))(torch.randn(6, D)).to_json()


@st.composite
def damaged(draw) -> str:
    """The plan with a few values exchanged, removed or added, or a few characters of its text changed."""
    if draw(st.integers(0, 3)) == 0:
        text = list(sound())
        for _ in range(draw(st.integers(1, 4))):
            text[draw(st.integers(0, len(text) - 1))] = draw(st.characters())
        return "".join(text)
    data = json.loads(sound())
    for _ in range(draw(st.integers(1, 3))):
        _damage(draw, data)
    return json.dumps(data)


def _damage(draw, data: Any) -> None:
    place = data
    for _ in range(draw(st.integers(0, 5))):
        inner = place.values() if isinstance(place, dict) else place
        containers = [v for v in inner if isinstance(v, (dict, list)) and v]
        if not containers:
            break
        place = draw(st.sampled_from(containers))
    keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
    key = draw(st.sampled_from(keys))
    how = draw(st.sampled_from(["exchange", "remove", "add", "repeat"]))
    if how == "remove":
        del place[key]
    elif how == "add" and isinstance(place, dict):
        place[draw(st.text(max_size=6))] = draw(VALUES)
    elif how == "repeat" and isinstance(place, list):
        place.append(copy.deepcopy(place[key]))
    else:
        place[key] = draw(VALUES)


@fuzzing.inputs(120)
@given(damaged())
def test_a_damaged_plan_is_read_or_refused_and_every_view_of_it_works(text):
    fuzzing.tried["damaged plan files"] += 1
    try:
        report = PlanReport.from_json(text)
    except errors.BadReport:
        return
    fuzzing.tried["of them read as plans"] += 1
    assert PlanReport.from_json(report.to_json()) == report or "nan" in text.lower()
    report.to_text()
    diff(PlanReport.from_json(sound()), report).to_json()


@fuzzing.inputs(6)
@given(damaged())
def test_a_damaged_plan_that_is_replayed_never_changes_a_number(text):
    torch.manual_seed(0)
    model, x = Net(1), torch.randn(6, D)
    try:
        pinned = PlanReport.from_json(text)
    except errors.BadReport:
        return
    torch._dynamo.reset()
    with _compat.many_recompiles():
        y = torch.compile(model, backend="moepass", options={"inner": "eager", "plan": pinned})(x)
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    fuzzing.tried["damaged plans replayed"] += 1
