"""Watching the sites of a model while it runs: who was sent where, and what each lowering takes on those operands.

Contract
    in    an owned graph in which every planned site is one node with the schema of ``moepass::experts``
    out   the same graph, computing the same, whose site nodes report here when they are called
    Each kind of site (shape and plan) is timed once on its real operands, and again at other layers while the time
    that all timing took is below ``BUDGET``; routing is counted at every call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moepass import spec
from moepass.decide import Planned
from moepass.explain.analysis import SiteAnalysis, Timing, order
from moepass.lowering.base import ExpertArgs
from moepass.lowering.facts import Fact
from moepass.lowering.hardware import Hardware
from moepass.lowering.measure import Operands, Samples, sample, shortlist
from moepass.lowering.plan import Workload
from moepass.lowering.registry import lowerings

#: Seconds after which a kind of site that has been timed once is not timed again.
BUDGET = 15.0
#: Runs of each candidate, fewer where one is predicted to take long (seconds for all runs of a candidate).
REPEATS, LONG = 5, 10.0


@dataclass
class Record:
    """One site at one T, added up over its calls."""

    calls: int = 0
    load: list[int] = field(default_factory=list)
    dropped: int = 0
    unrouted: int = 0
    timed_as: str = ""
    timings: tuple[Timing, ...] = ()


class Probes:
    """The records of one run of a model."""

    def __init__(self, hw: Hardware) -> None:
        self.hardware = hw
        self.records: dict[tuple[str, int, bool], Record] = {}
        self._spent = 0.0
        self._timed: dict[tuple[str, Workload], str] = {}
        self._seen: list[tuple[str, Workload]] = []

    def sites(self) -> tuple[SiteAnalysis, ...]:
        """What was seen."""
        return tuple(
            SiteAnalysis(
                id=id,
                tokens=tokens,
                train=train,
                calls=r.calls,
                load=tuple(r.load),
                dropped=r.dropped,
                unrouted=r.unrouted,
                timed_as=r.timed_as,
                timings=r.timings,
            )
            for (id, tokens, train), r in self.records.items()
        )

    def probe(self, decision: Planned, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``op`` of a site, reporting here."""

        def probe(*args: Any) -> Tensor:
            self._see(decision, args)
            return op(*args)

        return probe

    def facts(self) -> tuple[Fact, ...]:
        """What was timed, by workload."""
        return facts_of((work, self.records[id, work.tokens, work.train].timings) for id, work in self._seen)

    def _see(self, decision: Planned, args: Sequence[Any]) -> None:
        x_TD, index_TK, weight_TK = args[:3]
        work = decision.plan.workload.model_copy(update={"tokens": x_TD.shape[0], "device": x_TD.device.type})
        key = (decision.id, work.tokens, work.train)
        load, unrouted, dropped = count(index_TK, work)
        first = key not in self.records
        record = self.records.setdefault(key, Record(load=[0] * work.E))
        record.calls += 1
        record.load = [a + b for a, b in zip(record.load, load, strict=True)]
        record.unrouted += unrouted
        record.dropped += dropped
        if first:
            self._time(decision, work, record, (x_TD, index_TK, weight_TK, ExpertArgs(*args[3:])), load)

    def _time(self, decision: Planned, work: Workload, record: Record, tensors: Operands, load: list[int]) -> None:
        kind = (decision.plan.lowering, work)
        if work.tokens == 0 or (kind in self._timed and self._spent > BUDGET):
            record.timed_as = self._timed.get(kind, decision.id)
            return
        start = time.perf_counter()
        record.timings = timings(tensors_for(tensors, work), work, self.hardware, decision.plan.lowering, load)
        record.timed_as = decision.id
        self._seen.append((decision.id, work))
        self._spent += time.perf_counter() - start
        self._timed.setdefault(kind, decision.id)


def facts_of(timed: Iterable[tuple[Workload, Sequence[Timing]]]) -> tuple[Fact, ...]:
    """For each workload the medians over everything that was timed of it."""
    found: dict[Workload, dict[str, list[Timing]]] = {}
    for work, several in timed:
        for timing in several:
            if timing.seconds is not None:
                found.setdefault(work, {}).setdefault(timing.lowering, []).append(timing)
    return tuple(
        Fact(
            work=work,
            seconds=tuple((name, statistics.median(t.seconds or 0.0 for t in ts)) for name, ts in by_name.items()),
            source="analyze",
            runs=min(sum(t.runs for t in ts) for ts in by_name.values()),
        )
        for work, by_name in found.items()
    )


def count(index_TK: Tensor, work: Workload) -> tuple[list[int], int, int]:
    """``(load by expert, pairs without an expert, pairs over capacity)`` of a routing."""
    flat = index_TK.reshape(-1).long()
    inside = flat[(flat >= 0) & (flat < work.E)]
    load = [int(n) for n in torch.bincount(inside, minlength=work.E).tolist()]
    return load, flat.numel() - inside.numel(), sum(load) - sum(min(n, room(work)) for n in load)


def room(work: Workload) -> int:
    """Pairs that an expert takes: its capacity, or all."""
    if work.capacity_factor is None:
        return work.R
    return spec.capacity(work.capacity_factor, work.tokens, work.K, work.E)


def tensors_for(tensors: Operands, work: Workload) -> Operands:
    """The operands in the workload's dtype, apart from the model's autograd graph; with gradients if it trains."""
    dtype = getattr(torch, work.dtype)

    def own(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().to(dtype).requires_grad_(work.train)

    x_TD, index_TK, weight_TK, args = tensors
    names = ("w_in", "w_out", "b_in", "b_out")
    args = replace(args, **{name: own(getattr(args, name)) for name in names})
    return own(x_TD), index_TK, weight_TK.detach().requires_grad_(work.train), args


def timings(tensors: Operands, work: Workload, hw: Hardware, chosen: str, load: Sequence[int]) -> tuple[Timing, ...]:
    """The chosen lowering and every one that might beat it, run on these operands; fastest first."""
    pool = lowerings()
    candidates = {chosen: pool[chosen], **shortlist(work, hw, pool)}
    slowest = max(lowering.price(work, hw).total for lowering in candidates.values())
    repeats = max(1, min(REPEATS, int(LONG / max(slowest, 1e-9))))
    found = sample(tensors, candidates, train=work.train, repeats=repeats, peaks=True)
    kept = sum(min(n, room(work)) for n in load)
    padding = {name: max(0, lowering.computed_rows(load, work) - kept) for name, lowering in candidates.items()}
    return tuple(sorted((_timing(name, s, padding[name]) for name, s in found.items()), key=order))


def _timing(name: str, samples: Samples, padding: int) -> Timing:
    if samples.failed is not None or not samples.seconds:
        return Timing(lowering=name, failed=samples.failed or "it was not run")
    return Timing(
        lowering=name,
        seconds=statistics.median(samples.seconds),
        fastest=min(samples.seconds),
        slowest=max(samples.seconds),
        runs=len(samples.seconds),
        peak_bytes=samples.peak_bytes,
        padding_rows=padding,
    )
