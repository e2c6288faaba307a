"""Measurement: real lowerings on this device, failures dropped, results cached."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from moepass.kernels import host
from moepass.lowering import cache
from moepass.lowering.base import ExpertArgs, Lowering
from moepass.lowering.hardware import Hardware
from moepass.lowering.measure import measure, operands, sample, shortlist
from moepass.lowering.plan import Price, Verdict, Workload
from moepass.lowering.registry import lowerings

TINY = Workload(tokens=4, D=16, F=8, E=4, K=2, n=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(tmp_path / "cache"))


@dataclass(frozen=True)
class Sleeps(Lowering):
    """Takes the time it is told, or raises."""

    name: ClassVar[str] = "sleeps"
    seconds: float = 0.0
    error: Exception | None = None
    calls: list[str] = field(default_factory=list)

    def legal(self, work: Workload) -> Verdict:
        return Verdict.yes()

    def price(self, work: Workload, hw: Hardware) -> Price:
        return Price(overhead=self.seconds)

    def build(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, args: ExpertArgs) -> Tensor:
        self.calls.append("call")
        if self.error is not None:
            raise self.error
        time.sleep(self.seconds)
        return x_TD * weight_TK.sum() * args.w_in.sum() * args.w_out.sum()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_every_legal_lowering_is_timed(train, n):
    work = TINY.model_copy(update={"train": train, "n": n, "bias": True})
    timings = measure(work, lowerings(), repeats=1)
    assert set(timings) == {"dense", "gathered", "grouped"}
    assert all(seconds > 0 for seconds in timings.values())
    assert timings.dropped == {}


def test_capacity_is_timed_where_the_spec_drops():
    assert set(measure(TINY.model_copy(update={"capacity_factor": 1.0}), lowerings(), repeats=1)) == {"capacity"}


def test_peak_memory_counts_buffers_of_our_own():
    work = TINY.model_copy(update={"tokens": 512, "D": 64, "F": 512})  # 512 * K rows of n * F hidden features
    found = sample(operands(work), {"grouped": lowerings()["grouped"]}, train=False, repeats=1, peaks=True)
    assert found["grouped"].peak_bytes > 512 * work.K * work.n * work.F * work.itemsize >= host.LARGE_BYTES


def test_slower_candidate_measures_slower():
    timings = measure(TINY, {"slow": Sleeps(0.02), "fast": Sleeps(0.0)}, repeats=3)
    assert timings["slow"] > 0.02 > timings["fast"]


def test_candidate_that_raises_is_dropped_with_the_reason_and_not_tried_again(caplog):
    broken = Sleeps(error=torch.OutOfMemoryError("tried to allocate 3 GiB\nmore"))
    timings = measure(TINY, {"broken": broken, "works": Sleeps()}, repeats=3)
    assert set(timings) == {"works"}
    assert timings.dropped == {"broken": "OutOfMemoryError: tried to allocate 3 GiB"}
    assert broken.calls == ["call"]
    assert "broken could not run" in caplog.text


def test_second_measurement_comes_from_the_cache():
    candidate = Sleeps()
    first = measure(TINY, {"a": candidate}, repeats=2)
    calls = len(candidate.calls)
    second = measure(TINY, {"a": candidate}, repeats=2)
    assert (second, second.dropped, len(candidate.calls)) == (first, first.dropped, calls)
    measure(TINY.model_copy(update={"tokens": 5}), {"a": candidate}, repeats=2)
    assert len(candidate.calls) > calls


def test_failures_are_cached_too():
    broken = Sleeps(error=RuntimeError("no"))
    measure(TINY, {"broken": broken}, repeats=1)
    again = measure(TINY, {"broken": broken}, repeats=1)
    assert (again.dropped, broken.calls) == ({"broken": "RuntimeError: no"}, ["call"])


@pytest.mark.parametrize("change", [{"seconds": {"a": "fast"}}, {"seconds": None}, {"key": {}}, None])
def test_damaged_measurement_is_ignored_with_a_warning_and_replaced(caplog, change):
    candidate = Sleeps()
    measure(TINY, {"a": candidate}, repeats=1)
    (path,) = cache.directory().iterdir()
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    calls = len(candidate.calls)
    assert measure(TINY, {"a": candidate}, repeats=1)["a"] > 0
    assert len(candidate.calls) > calls
    assert "ignoring" in caplog.text
    assert json.loads(path.read_text())["seconds"]["a"] > 0


def test_unwritable_cache_only_costs_a_warning(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(blocked / "below"))
    assert measure(TINY, {"a": Sleeps()}, repeats=1)["a"] > 0
    assert "could not write" in caplog.text


def test_cache_can_be_left_alone():
    measure(TINY, {"a": Sleeps()}, repeats=1, use_cache=False)
    assert not cache.directory().exists()


def test_operands_have_the_workloads_shapes_and_distinct_experts_a_token():
    work = TINY.model_copy(update={"n": 1, "bias": True, "dtype": "bfloat16", "train": True})
    x_TD, index_TK, weight_TK, args = operands(work)
    assert (x_TD.shape, x_TD.dtype, x_TD.requires_grad) == ((4, 16), torch.bfloat16, True)
    assert (args.w_in.shape, args.w_out.shape) == ((4, 8, 16), (4, 16, 8))
    assert args.b_in is not None
    assert args.b_out is not None
    assert (args.b_in.shape, args.b_out.shape) == ((4, 8), (4, 16))
    assert weight_TK.dtype == torch.float32
    assert all(len(set(row)) == 2 for row in index_TK.tolist())
    assert torch.equal(x_TD, operands(work)[0])


def test_shortlist_keeps_what_is_within_the_factor_and_legal():
    pool = {"best": Sleeps(1.0), "near": Sleeps(4.0), "far": Sleeps(6.0), "capacity": lowerings()["capacity"]}
    assert list(shortlist(TINY, Hardware.preset("cpu"), pool)) == ["best", "near"]
