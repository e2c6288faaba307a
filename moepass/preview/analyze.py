"""``explain --analyze``: a run of the model, or of its blocks alone, beside the estimates.

Two sources, and the report says which:

    the model's own   it has weights and inputs: it runs once, in eager mode and without gradients, with every site
                      rewritten as planned; routing, operands and times are those of this run
    drawn             it is on the meta device (a config without weights): each kind of block runs alone, on operands
                      and a routing that are drawn as ``--routing`` says

Nothing is left attached to the model's weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moepass import _compat, errors
from moepass.backend import Binding, Decision, bound, rewrite
from moepass.decide import Planned
from moepass.explain.analysis import Analysis, SiteAnalysis
from moepass.explain.report import PlanReport, SitePlan
from moepass.graph.capture import Capture
from moepass.lowering import machine
from moepass.lowering.hardware import Hardware, remember
from moepass.lowering.inline import lowered_op
from moepass.lowering.measure import operands
from moepass.lowering.plan import Workload
from moepass.lowering.registry import lowerings
from moepass.preview.probe import Probes, count, facts_of, timings

#: Part of the free memory that a drawn block may take.
_SHARE = 0.6


@dataclass(frozen=True)
class Rewritten:
    """A graph as planned: callable, and with the nodes of its sites known."""

    capture: Capture
    bindings: tuple[Binding, ...]
    nodes: tuple[tuple[Planned, fx.Node], ...]  # calls of lowered ops

    @classmethod
    def of(cls, capture: Capture, decisions: Sequence[Decision]) -> Rewritten:
        """Rewrite the captured graph, which nothing else may use from then on."""
        nodes: list[tuple[Planned, fx.Node]] = []
        ops = {lowered_op(name) for name in lowerings()}

        def locate(decision: Planned) -> None:
            known = {node for _, node in nodes}
            graph = capture.body(decision.path).graph
            nodes.extend((decision, node) for node in graph.nodes if node.target in ops and node not in known)

        planned = [d for d in decisions if isinstance(d, Planned)]
        bindings = rewrite(capture, planned, locate)
        made = cls(capture, tuple(bindings), tuple(nodes))
        made.recompile()
        return made

    def recompile(self) -> None:
        """Make the code of every graph afresh."""
        for _, body in self.capture.bodies():
            body.graph.lint()
            body.recompile()

    def source(self) -> str:
        """The graph as Python source."""
        return _compat.readable(self.capture.gm)

    def runnable(self, probes: Probes) -> Callable[..., Any]:
        """The graph, whose sites report to ``probes`` when it is called; runs eagerly, without gradients."""
        for decision, node in self.nodes:
            assert callable(node.target)
            node.target = probes.probe(decision, node.target)
        self.recompile()
        forward = bound(self.capture.gm.forward, self.bindings)

        def run(*args: Any) -> Any:
            with torch.no_grad():
                return forward(*args)

        return run


def analysis(source: str, device: str, sites: Sequence[SiteAnalysis] = ()) -> Analysis:
    """With what is known of the machine.  To be made before the run, so that the load average is not its own."""
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return Analysis(source=source, machine=machine.describe(device), load_average=load, sites=tuple(sites))


def measured(report: PlanReport, before: Analysis, probes: Mapping[str, Probes]) -> PlanReport:
    """The report of a model that ran, with what its sites saw; ``before``: an empty analysis.  Later plans learn."""
    for kind, probe in probes.items():
        remember(kind, probe.facts())
    sites = tuple(site for probe in probes.values() for site in probe.sites())
    device = next(iter(probes), "cpu")
    found = {"sites": sites, "machine": machine.describe(device)}
    return report.model_copy(update={"kind": "analyze", "analysis": before.model_copy(update=found)})


def check_device(device: str, hw: Hardware) -> None:
    """Raise ``BadOption`` where a plan for ``hw`` would be measured on another kind of device."""
    if device != hw.device:
        detail = f"the plan is for {hw.name}, a {hw.device} device, and this would measure on {device}"
        raise errors.BadOption(name="analyze", value=True, detail=f"{detail}; leave out hardware")


def here(hw: Hardware) -> str:
    """The device on which blocks of a meta model can be run for this profile.  Raises ``BadOption``."""
    device = hw.device if hw.device == "cpu" or torch.accelerator.is_available() else "cpu"
    check_device(device, hw)
    return device


def drawn(report: PlanReport, hw: Hardware, routing: str) -> PlanReport:
    """The report of a model on the meta device, with its kinds of blocks run alone on drawn operands."""
    device = here(hw)
    empty = analysis(f"operands and routing drawn at random ({routing} routing); no weights were read", device)
    kinds: dict[tuple[str | None, Workload], list[str]] = {}
    for entry in report.sites:
        if entry.status == "lowered" and entry.workload is not None:
            kinds.setdefault((entry.lowering, _on(entry, device)), []).extend(entry.ids)
    alone = {kind: _alone(str(kind[0]), kind[1], ids, hw) for kind, ids in kinds.items()}
    remember(device, facts_of((work, found[0].timings) for (_, work), found in alone.items()))
    sites = [site for found in alone.values() for site in found]
    return report.model_copy(update={"kind": "analyze", "analysis": empty.model_copy(update={"sites": tuple(sites)})})


def _on(entry: SitePlan, device: str) -> Workload:
    assert entry.workload is not None
    return entry.workload.model_copy(update={"device": device})


def _alone(lowering: str, work: Workload, ids: Sequence[str], hw: Hardware) -> list[SiteAnalysis]:
    """One kind of block by itself; the other sites of that kind refer to the first."""
    first, *others = dict.fromkeys(ids)
    if (refusal := _too_large(work)) is not None:
        return [SiteAnalysis(id=name, tokens=work.tokens, train=work.train, calls=0, skipped=refusal) for name in ids]
    tensors = operands(work)
    load, unrouted, dropped = count(tensors[1], work)
    timed = SiteAnalysis(
        id=first,
        tokens=work.tokens,
        train=work.train,
        load=tuple(load),
        dropped=dropped,
        unrouted=unrouted,
        timed_as=first,
        timings=timings(tensors, work, hw, lowering, load),
    )
    rest = (SiteAnalysis(id=n, tokens=work.tokens, train=work.train, calls=0, timed_as=first) for n in others)
    return [timed, *rest]


def _too_large(work: Workload) -> str | None:
    """Why a block cannot be made here; its weights (and their gradients) are what counts."""
    free = machine.free_bytes(work.device)
    need = work.E * work.weight_elements * work.itemsize * (2 if work.train else 1)
    need += work.R * (2 * work.D + (work.n + 1) * work.F) * work.itemsize
    if work.tokens == 0:
        return "T = 0: there is nothing to run"
    if free is None or need <= _SHARE * free:
        return None
    return f"it takes {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free here"
