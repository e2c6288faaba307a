"""PlanReport: what the compiler did with each feed-forward site, why, and at what price.

One frozen value is the source; text, JSON and HTML are views of it.  The same value comes from
``moepass.explain(model)(*args)``, ``moepass.last_plan()``, the trace artifacts and the command line.

Times are seconds.  ``predicted`` is always an estimate of the cost model, ``measured`` always a median of real runs
that took part in the decision; what ``--analyze`` measured stands in ``analysis``, which decides nothing.
Content is canonical: sites and notes are sorted, and nothing in it is an address, a counter or a date.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import re
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from moepass import errors
from moepass.explain.analysis import Analysis
from moepass.explain.decision import decision
from moepass.frozen import Frozen
from moepass.lowering.forms import FormPlan
from moepass.lowering.plan import Alternative, Plan, Sweep, TokenRange, Workload

#: Version of the JSON form.  Within one major version changes only add fields.
SCHEMA_VERSION = "1.5"

Kind = Literal["dense_ffn", "moe"]
Status = Literal["lowered", "skipped", "fallback"]
Scalar = bool | int | float | str | None


def _moepass_version() -> str:
    import moepass

    return moepass.__version__


class SitePlan(Frozen):
    """What happens to one site over one range of token counts.

    ``id``           fully-qualified module name; ``shared_by`` names further sites that have the very same plan
    ``status``       ``lowered``: planned and rewritten; ``skipped``: left as it was, on purpose; ``fallback``: left as
                     it was because something failed
    ``reason``       stable code (``moepass.graph.site.REASONS``, ``errors.*.code``) where not lowered, else None
    ``tokens``       the range of T this entry speaks for; None: any T
    ``activation``   pointwise expression between the projections
    ``init``         how expert weights came from dense ones, for instance ``"virtual_groups, exact"``
    ``alternatives`` every lowering that was considered, best first, illegal last
    ``predicted``    estimated seconds of the chosen lowering; ``measured`` its median seconds where it was timed
    ``decided_by``   what made the choice: the estimate, a measurement, estimates corrected by measurements at other T,
                     or a pinned plan; ``evidence``: measurements from before this compile, in words
    ``guard``        the condition that the compiled graph checks before it uses this entry
    ``ep``           on a mesh: how the experts are spread over ranks, every form with its price.  The entry's other
                     figures are then those of one rank's own experts
    """

    id: str
    kind: Kind
    status: Status
    reason: str | None = None
    detail: str | None = None
    hint: str | None = None
    tokens: TokenRange | None = None
    workload: Workload | None = None
    activation: str | None = None
    init: str | None = None
    lowering: str | None = None
    alternatives: tuple[Alternative, ...] = ()
    predicted: float | None = Field(None, ge=0)
    measured: float | None = Field(None, ge=0)
    decided_by: Literal["estimate", "measurement", "learned", "pin"] | None = None
    evidence: str | None = None
    guard: str | None = None
    shared_by: tuple[str, ...] = ()
    ep: FormPlan | None = None

    @model_validator(mode="after")
    def _status_is_explained(self) -> Self:
        if self.status == "lowered" and self.lowering is None:
            raise ValueError("a lowered site names its lowering")
        if self.status != "lowered" and self.reason is None:
            raise ValueError(f"a {self.status} site has a reason code")
        return self

    @classmethod
    def from_plan(
        cls,
        id: str,
        kind: Kind,
        plan: Plan,
        *,
        activation: str | None = None,
        init: str | None = None,
        guard: str | None = None,
        hint: str | None = None,
    ) -> SitePlan:
        """The entry of a site that was lowered by ``plan``."""
        price = plan.chosen.predicted
        return cls(
            id=id,
            kind=kind,
            status="lowered",
            hint=hint,
            tokens=plan.tokens,
            workload=plan.workload,
            activation=activation,
            init=init,
            lowering=plan.lowering,
            alternatives=plan.alternatives,
            predicted=None if price is None else price.total,
            measured=plan.chosen.measured,
            decided_by=plan.decided_by,
            evidence=plan.evidence,
            guard=guard,
        )

    @property
    def ids(self) -> tuple[str, ...]:
        """Every site this entry speaks for."""
        return (self.id, *self.shared_by)


class KernelSource(Frozen):
    """One emitted kernel file of the sites that have one plan; ``site`` names them, such as ``model.layers.*.mlp``.

    ``name``    of the step, such as ``forward_up``; ``tokens`` the range that the site's entry speaks for
    ``source``  the file: torch and triton only; running it compares it with plain PyTorch
    ``registers``, ``spills``, ``shared_bytes``   the largest over its kernels, where ``kernels.aot`` compiled them
    ``tile``    block sizes, warps and stages of its kernels
    """

    name: str
    site: str
    tokens: TokenRange | None = None
    target: str
    source: str
    registers: int | None = None
    spills: int | None = None
    shared_bytes: int | None = None
    tile: str


class GraphPlan(Frozen):
    """One compiled graph: the guards that planning added, and what is known about the caches (hit, miss, bypass).

    ``before``, ``after``: the graph as source to read, where that was asked for; ``after`` as planned for the first T
    """

    index: int = Field(ge=0)
    guards: tuple[str, ...] = ()
    cache: str | None = None
    before: str | None = None
    after: str | None = None


class PlanReport(Frozen):
    """The plan of a model (or of one graph of it).  See the module docstring.

    ``kind``      ``explain``: nothing was run; ``compile``: made by ``torch.compile``; ``analyze``: run and timed
    ``hardware``  name of the profile that priced the candidates; ``device`` the device type of the model
                  (``cpu+cuda`` after merging graphs on both)
    ``settings``  the options that were in force
    ``notes``     sentences for the reader: failures, fallbacks, approximations
    ``sweeps``    estimates over token counts for each kind of block: the source of charts, no part of the decision
    ``kernels``   emitted sources, where they were asked for: they follow from the decision
    ``analysis``  what was run and measured, where the kind is ``analyze``: no part of the decision either
    """

    schema_version: str = SCHEMA_VERSION
    kind: Literal["explain", "compile", "analyze"] = "compile"
    moepass_version: str = Field(default_factory=_moepass_version)
    torch_version: str = Field(default_factory=lambda: importlib.metadata.version("torch"))
    hardware: str
    device: str
    settings: dict[str, Scalar] = Field(default_factory=dict)
    sites: tuple[SitePlan, ...] = ()
    graphs: tuple[GraphPlan, ...] = ()
    notes: tuple[str, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    analysis: Analysis | None = None
    kernels: tuple[KernelSource, ...] = ()

    @field_validator("schema_version")
    @classmethod
    def _readable(cls, version: str) -> str:
        if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise ValueError(f"schema version {version} cannot be read by this moepass, which reads {SCHEMA_VERSION}")
        return version

    @field_validator("settings")
    @classmethod
    def _sort_settings(cls, settings: dict[str, Scalar]) -> dict[str, Scalar]:
        return dict(sorted(settings.items()))

    @field_validator("sites")
    @classmethod
    def _sort_sites(cls, sites: tuple[SitePlan, ...]) -> tuple[SitePlan, ...]:
        return tuple(sorted(sites, key=_order))

    @field_validator("notes")
    @classmethod
    def _sort_notes(cls, notes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(notes)))

    @property
    def summary(self) -> dict[str, int]:
        """Sites by status: ``candidates`` is the number of distinct sites, the other three add up to it.

        A site with several token ranges counts once, as its worst status (fallback, then skipped only if all are).
        """
        statuses: dict[str, set[Status]] = {}
        for site in self.sites:
            for name in site.ids:
                statuses.setdefault(name, set()).add(site.status)
        counts = {"candidates": len(statuses), "lowered": 0, "skipped": 0, "fallback": 0}
        for seen in statuses.values():
            counts["fallback" if "fallback" in seen else "lowered" if "lowered" in seen else "skipped"] += 1
        return counts

    @property
    def headline(self) -> str:
        """The counts in one line."""
        c = self.summary
        return f"{c['candidates']} candidates: {c['lowered']} lowered, {c['skipped']} skipped, {c['fallback']} fallback"

    @property
    def fingerprint(self) -> str:
        """16 hex digits over what was decided: settings, moepass version, hardware, device, and each site's choice.

        Seconds, free text, the representative T inside a range, torch's version, notes and cache state are left out,
        so equal decisions have equal fingerprints in every process and on every rank.
        """
        sites = sorted(json.dumps([name, decision(site)], sort_keys=True) for site in self.sites for name in site.ids)
        stable = [self.moepass_version, self.hardware, self.device, self.settings, sites]
        return hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()[:16]

    def site(self, id: str, tokens: int | None = None) -> SitePlan:
        """The entry of site ``id`` that serves ``tokens`` tokens; without ``tokens``, that of the lowest range.

        Raises `errors.NoSuchSite` if there is none.
        """
        entries = [s for s in self.sites if id in s.ids]
        for entry in entries:
            if tokens is None or entry.tokens is None or tokens in entry.tokens:
                return entry
        if entries:
            raise errors.NoSuchSite(detail=f"site {id!r} has no plan for T = {tokens}")
        names = [name for s in self.sites for name in s.ids]
        near = difflib.get_close_matches(id, names, n=1)
        raise errors.NoSuchSite(detail=f"there is no site {id!r}" + (f"; did you mean {near[0]!r}?" if near else ""))

    def merge(self, other: PlanReport) -> PlanReport:
        """One report of both: several graphs of a model, or several token counts of one.

        An entry of ``other`` replaces the entry for the same site, range and workload.  Raises `errors.CannotMerge`
        where the two were made for different hardware, by different versions or with conflicting settings.
        """
        for field in ("moepass_version", "torch_version", "hardware"):
            _same(field, getattr(self, field), getattr(other, field))
        for name in self.settings.keys() & other.settings.keys():
            _same(f"setting {name!r}", self.settings[name], other.settings[name])
        sites = {_slot(s): s for s in (*self.sites, *other.sites)}
        graphs = (*self.graphs, *(g for g in other.graphs if g not in self.graphs))
        return PlanReport(
            kind=other.kind,
            moepass_version=self.moepass_version,
            torch_version=self.torch_version,
            hardware=self.hardware,
            device="+".join(sorted({*self.device.split("+"), *other.device.split("+")})),
            settings={**self.settings, **other.settings},
            sites=tuple(sites.values()),
            graphs=tuple(g.model_copy(update={"index": i}) for i, g in enumerate(graphs)),
            notes=(*self.notes, *other.notes),
            sweeps=tuple({s.workload: s for s in (*self.sweeps, *other.sweeps)}.values()),
            analysis=_both(self.analysis, other.analysis),
            kernels=tuple(dict.fromkeys((*self.kernels, *other.kernels))),
        )

    def to_json(self) -> str:
        """JSON, indented, with the derived ``fingerprint``, ``summary`` and price totals written out."""
        data = self.model_dump(mode="json")
        for site, dumped in zip(self.sites, data["sites"], strict=True):
            for alternative, entry in zip(site.alternatives, dumped["alternatives"], strict=True):
                if alternative.predicted is not None:
                    entry["predicted"]["total"] = alternative.predicted.total
        return json.dumps({**data, "fingerprint": self.fingerprint, "summary": self.summary}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> PlanReport:
        """The report that `to_json` wrote; derived values are computed afresh.

        Raises `errors.BadReport` for anything that is not a report of this schema version.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise errors.BadReport(detail=f"not JSON ({error})") from None
        if not isinstance(data, dict) or "schema_version" not in data:
            raise errors.BadReport(detail="there is no 'schema_version' in it")
        try:
            return cls.model_validate(_without_derived(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the report"
            raise errors.BadReport(detail=f"{where}: {first['msg']}") from None

    def to_text(self, width: int = 120) -> str:
        """A tree for people; plain characters, no colours."""
        from moepass.explain import text

        return text.render(self, width)

    def to_html(self) -> str:
        """One self-contained HTML page."""
        from moepass.explain import html

        return html.render(self)


def _both(one: Analysis | None, other: Analysis | None) -> Analysis | None:
    return one.merge(other) if one is not None and other is not None else one or other


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    parts = re.split(r"(\d+)", name, flags=re.ASCII)
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts)


def _order(site: SitePlan) -> tuple[Any, ...]:
    low, high = (0, None) if site.tokens is None else (site.tokens.low, site.tokens.high)
    rest = "" if site.workload is None else site.workload.model_dump_json()
    return (natural_key(site.id), low, float("inf") if high is None else high, rest, site.status)


def _slot(site: SitePlan) -> tuple[Any, ...]:
    """What an entry speaks for: a site, a range, and a workload but for its representative T."""
    work = None if site.workload is None else site.workload.model_copy(update={"tokens": 0})
    return (site.id, site.tokens, work)


def _without_derived(data: dict[str, Any]) -> dict[str, Any]:
    """``data`` without what `PlanReport.to_json` computed; tolerates any shape, validation comes later."""
    data = {key: value for key, value in data.items() if key not in ("fingerprint", "summary")}
    for site in _dicts(data.get("sites")):
        for alternative in _dicts(site.get("alternatives")):
            for price in _dicts([alternative.get("predicted")]):
                price.pop("total", None)
    return data


def _dicts(values: object) -> list[dict[str, Any]]:
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def _same(what: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise errors.CannotMerge(what=what.replace("_", " "), ours=ours, theirs=theirs)
