"""The plan of a model on a mesh of ranks that need not exist: every lowered block gets its expert-parallel forms.

A report of one rank goes in, a report of the mesh comes out; nothing is traced again, and no process group is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moepass import errors
from moepass.explain.report import PlanReport, SitePlan
from moepass.lowering.ep_plan import form_plan, form_sweep, on_mesh
from moepass.lowering.hardware import Hardware, load_hardware
from moepass.lowering.mesh import MeshSpec, parse
from moepass.lowering.plan import Sweep, Workload


@dataclass(frozen=True)
class Spread:
    """What ``--mesh`` and its companions say.

    ``mesh``           ``"node=16,ep=8"``, outermost dimension first (``lowering.mesh``)
    ``ep``             dimensions that hold experts; None: those called ``node`` and ``ep``
    ``tp``             the dimension whose ranks share each expert's F; None: experts are whole
    ``links``          ``"node=ib,ep=nvlink"`` or one link for all; None: those of the hardware
    ``same_tokens``    every rank holds the same T tokens (decode), instead of T of its own
    ``buffer_factor``  static buffers of that many times the mean rows, which may drop rows; None: never drop
    """

    mesh: str
    ep: Sequence[str] | None = None
    links: str | None = None
    same_tokens: bool = False
    buffer_factor: float | None = None
    tp: str | None = None

    def on(self, hw: Hardware) -> MeshSpec:
        """The mesh, with the links that are meant on ``hw``.  Raises ``BadMesh``, ``UnknownLink``, ``BadOption``."""
        if self.buffer_factor is not None and not 0 < self.buffer_factor < float("inf"):
            raise errors.BadOption(
                name="--buffer-factor", value=self.buffer_factor, detail="give a number above 0, such as 1.25"
            )
        return parse(self.mesh, hw, ep=self.ep, links=self.links, tp=self.tp)

    def check(self, hardware: object, *, analyze: bool = False) -> None:
        """Refuse what cannot be planned before anything is traced: as ``on``, and an analysis."""
        if analyze:
            raise errors.BadOption(
                name="--analyze", value=True, detail="it runs one rank, and --mesh plans for many; leave one out"
            )
        name = None if hardware is None else str(hardware)
        self.on(hardware if isinstance(hardware, Hardware) else load_hardware(name, "cpu"))

    def workload(self, work: Workload, hw: Hardware) -> Workload:
        """The same block, its experts spread."""
        return on_mesh(work, self.on(hw), same_tokens=self.same_tokens, buffer_factor=self.buffer_factor)


def over_ranks(report: PlanReport, asked: Spread, hw: Hardware) -> PlanReport:
    """The report with the forms of every lowered block; its sweeps, which are of one rank, are left out.

    A block that no form can serve keeps its plan for one rank, and the report says so.
    """
    mesh = asked.on(hw)
    sites = tuple(_spread_site(site, asked, hw) for site in report.sites)
    settings = {"mesh": str(mesh), "same_tokens": asked.same_tokens, "buffer_factor": asked.buffer_factor}
    return report.model_copy(
        update={
            "sites": sites,
            "sweeps": (),
            "settings": dict(sorted({**report.settings, **settings}.items())),
            "notes": tuple(sorted({*report.notes, *_notes(sites, mesh)})),
        }
    )


def mesh_sweeps(works: Sequence[Workload], asked: Sequence[Spread], hw: Hardware, tokens: Sequence[int]) -> list[Sweep]:
    """Every form of every block over T, on every mesh."""
    return [form_sweep(each.workload(work, hw), hw, tokens) for work in works for each in asked]


def _spread_site(site: SitePlan, asked: Spread, hw: Hardware) -> SitePlan:
    if site.status != "lowered" or site.workload is None:
        return site
    work = asked.workload(site.workload, hw)
    found = form_plan(work, hw, site.tokens)
    if found.local is None:
        return site.model_copy(update={"workload": work, "ep": found})
    price = found.local.chosen.predicted
    local = {
        "lowering": found.local.lowering,
        "alternatives": found.local.alternatives,
        "predicted": None if price is None else price.total,
        "measured": None,
        "decided_by": "estimate",
    }
    return site.model_copy(update={"workload": work, "ep": found, **local})


def _notes(sites: Sequence[SitePlan], mesh: MeshSpec) -> list[str]:
    """A sentence for each number of experts that no form can spread."""
    stuck = {s.ep.workload.E for s in sites if s.ep is not None and s.ep.form is None}
    return [
        f"no expert-parallel form can spread E={E} experts over P={mesh.P} ranks: choose EP dimensions (--ep) whose "
        "product divides E; its entries keep the figures of one rank"
        for E in sorted(stuck)
    ]
