"""The Triton kernels of a plan: emitted source per block and target, with what the compiler needed for them if known.

A block is emitted where the plan chose the ``fused`` lowering, or wherever it could run, if asked (``every``).  Shapes
come from the plan; weights are taken in moepass's layout, ``w_in [E, n*F, D]`` and ``w_out [E, D, F]``, unless
``Layout`` says otherwise.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass

from moepass import errors, pointwise
from moepass.explain.groups import group
from moepass.explain.report import KernelSource, PlanReport, SitePlan
from moepass.frozen import Frozen
from moepass.kernels.aot import budgets
from moepass.kernels.emit.block import Emitted, emit_block
from moepass.kernels.emit.files import Facts
from moepass.kernels.emit.steps import Step
from moepass.kernels.fused.problem import ITEMSIZE, TARGETS, Problem, contiguous_strides
from moepass.lowering.fused import MAX_EXPERTS
from moepass.lowering.plan import TokenRange, Workload

#: The profile that prices a target's plan, where the user names the target.
PROFILES = {"sm_80": "A100", "sm_90": "H200", "sm_100": "B200", "gfx942": "MI300X"}
#: What each profile that ships with moepass compiles for.
ARCHITECTURES = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "B200": "sm_100", "MI300X": "gfx942"}


class Layout(Frozen):
    """How weights lie: ``transposed`` [E, D, n*F] and [E, F, D]; ``interleaved`` gate and up rows (GPT-OSS: both)."""

    transposed: bool = False
    interleaved: bool = False


#: The lowerings whose kernels these are, and whether they keep the pre-activations for a backward pass.
KEEPS = {"fused": True, "fused_recompute": False}


@dataclass(frozen=True)
class Block:
    """The files of one plan entry, for every site that has it.

    ``folder``  a safe name that no other entry of the report has
    ``label``   of the sites, such as ``model.layers.*.mlp``; ``site``: the entry, with the first one's id
    """

    folder: str
    label: str
    site: SitePlan
    target: str
    emitted: Emitted


def profile_of(target: str) -> str:
    """The hardware profile for a target or a profile's name; raises ``errors.BadOption`` for anything else."""
    by_name = {name.lower(): name for name in ARCHITECTURES}
    if target in PROFILES:
        return PROFILES[target]
    if target.lower() in by_name:
        return by_name[target.lower()]
    known = ", ".join([*PROFILES, *ARCHITECTURES])
    raise errors.BadOption(name="--target", value=target, detail=f"kernels are written for {known}")


def blocks(report: PlanReport, target: str, *, every: bool = False, layout: Layout | None = None) -> tuple[Block, ...]:
    """One block per token range of a group of equal sites that runs the fused kernels (``every``: that could).

    ``target``: a key of ``kernels.fused.problem.TARGETS``.  Raises ``errors.BadActivation`` for a program with
    constants that the kernels cannot hold.
    """
    made: list[Block] = []
    for alike in group(report):
        for site in alike.entries:
            if site.status == "lowered" and (every or site.lowering in KEEPS) and _possible(site):
                folder = _unique(_folder(alike.label, site.tokens), {block.folder for block in made})
                emitted = _emit(site, alike.label, report, target, layout or Layout())
                made.append(Block(folder, alike.label, site, target, emitted))
    return tuple(made)


def with_kernels(report: PlanReport, target: str) -> PlanReport:
    """The report with the sources of its fused blocks in ``kernels``."""
    found = tuple(source for block in blocks(report, target) for source in sources(block))
    return report.model_copy(update={"kernels": found})


def sources(block: Block) -> tuple[KernelSource, ...]:
    """Each kernel file of a block, with the numbers of the budget table where its very configuration is in it."""
    return tuple(_source(block, step, text) for step, text in block.emitted.kernels)


def _source(block: Block, step: Step, text: str) -> KernelSource:
    needs = [budgets.find(launch, block.target) for launch in step.launches]
    known = [found for found in needs if found is not None]
    whole = known if len(known) == len(needs) else []
    return KernelSource(
        name=step.name,
        site=block.label,
        tokens=block.site.tokens,
        target=block.target,
        source=text,
        registers=max((found.registers for found in whole), default=None),
        spills=max((found.spills for found in whole), default=None),
        shared_bytes=max((found.shared for found in whole), default=None),
        tile="; ".join(budgets.tile_text(launch) for launch in step.launches),
    )


def _possible(site: SitePlan) -> bool:
    """Whether the kernels compute what the entry says; a plan in a file may say anything."""
    work = site.workload
    if work is None or site.activation is None or work.dtype not in ITEMSIZE or work.capacity_factor is not None:
        return False
    if work.dropout or not 0 < work.E <= MAX_EXPERTS:
        return False
    return min(work.D, work.F, work.K) > 0 and pointwise.n_inputs(site.activation) == work.n


def _emit(site: SitePlan, label: str, report: PlanReport, target: str, layout: Layout) -> Emitted:
    assert site.workload is not None
    assert site.activation is not None
    save = site.workload.train and KEEPS.get(site.lowering or "", True)
    problem = _problem(site.workload, site.activation, layout, save=save)
    facts = Facts(_facts(site, label, report, target, layout), tokens=max(1, problem.tokens))
    return emit_block(problem, TARGETS[target], train=site.workload.train, facts=facts)


def _problem(work: Workload, activation: str, layout: Layout, *, save: bool) -> Problem:
    w_in, w_out = contiguous_strides(work.D, work.F, work.n, transposed=layout.transposed)
    return Problem(
        tokens=work.tokens,
        D=work.D,
        F=work.F,
        E=work.E,
        K=work.K,
        n=work.n,
        dtype=work.dtype,
        activation=activation,
        w_in=w_in,
        w_out=w_out,
        bias_in=work.bias,
        bias_out=work.bias,
        interleaved=layout.interleaved and work.n == 2,
        save=save,
    )


def _facts(site: SitePlan, label: str, report: PlanReport, target: str, layout: Layout) -> tuple[tuple[str, str], ...]:
    """What the header of each file says of the plan."""
    price = "" if site.predicted is None else f"; the whole block is estimated at {site.predicted * 1e6:.1f} us"
    tokens = "any T" if site.tokens is None else str(site.tokens)
    weights = "[E, D, n*F] and [E, F, D] in memory" if layout.transposed else "[E, n*F, D] and [E, D, F]"
    versions = f"moepass {report.moepass_version}, torch {report.torch_version}, triton {_triton()}"
    return (
        ("site", label),
        ("plan", f"{site.lowering} for {tokens} on {report.hardware}{price} with that lowering"),
        ("target", f"{target}; tiles chosen for T={site.workload.tokens if site.workload else 0}"),
        ("weights", f"w_in and w_out as {weights}"),
        ("versions", versions),
    )


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed here"


def _folder(label: str, tokens: TokenRange | None) -> str:
    """``model.layers.N.mlp.T1-64`` of ``model.layers.*.mlp``: letters, digits, dots and dashes only."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", label.replace("*", "N")).strip("._-")[:80] or "block"
    return f"{name}{_range(tokens)}"


def _range(tokens: TokenRange | None) -> str:
    if tokens is None:
        return ""
    high = "up" if tokens.high is None else tokens.high
    return f".T{tokens.low}" if tokens.low == high else f".T{tokens.low}-{high}"


def _unique(name: str, taken: set[str]) -> str:
    number, candidate = 2, name
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate
