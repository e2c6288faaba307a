"""The words and tables for expert-parallel forms, shared by the text and the HTML view."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from moepass.explain import phrases
from moepass.explain.report import PlanReport
from moepass.lowering.forms import FormOption, FormPlan, FormPrice, Traffic
from moepass.lowering.links import Link
from moepass.lowering.mesh import MeshSpec
from moepass.lowering.plan import Workload


def size(value: float) -> str:
    """Bytes with three significant digits: ``822 MB``, ``1.76 GB``."""
    for unit, scale in (("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)):
        if value / scale < 999.5 or unit == "TB":
            break
    scaled = value / scale
    return f"{scaled:.3g} {unit}" if scaled < 999.5 else f"{scaled:.0f} {unit}"


def title(plan: FormPlan) -> str:
    """The chosen form with the block's time and the runner-up."""
    chosen = plan.chosen
    if chosen is None or chosen.predicted is None:
        return "NO FORM is possible on this mesh"
    line = f"{chosen.form}   estimated {phrases.seconds(chosen.predicted.total)} a block"
    rest = [o for o in plan.options if o.legal and o.form != plan.form and o.predicted is not None]
    if not rest or rest[0].predicted is None:
        return f"{line}   (the only legal form)"
    margin = rest[0].predicted.total / chosen.predicted.total
    return f"{line}   (runner-up {rest[0].form}: {phrases.seconds(rest[0].predicted.total)}; margin {margin:.2f}x)"


def tokens(work: Workload) -> str:
    """What T means here."""
    P = 1 if work.mesh is None else work.mesh.P
    if work.same_tokens:
        return f"T = {work.tokens} tokens, the same on each of {P} EP ranks"
    return f"T = {work.tokens} tokens of each rank, {work.tokens * P} of {P} EP ranks"


def lines(plan: FormPlan) -> list[str]:
    """What the chosen form does, in sentences."""
    work = plan.workload
    chosen = plan.chosen
    told = [tokens(work)]
    if chosen is None or chosen.predicted is None or plan.local is None:
        return told
    price = chosen.predicted
    told.append(
        f"experts of a rank: {plan.local.workload.E} in {size(price.weight_bytes)}, {price.rows:,.0f} rows, "
        f"{price.busiest:,.0f} on the busiest rank ({plan.workload.routing} routing), by {price.lowering}"
    )
    told += [f"sent by a rank over {traffic(each)}" for each in price.traffic]
    kept = f", {size(price.saved_bytes)} saved for backward" if work.train else ""
    told.append(f"memory of a rank: {size(price.buffer_bytes)} of buffers{kept}")
    if price.shared:
        told.append(
            f"shared expert: {phrases.seconds(price.shared)}, {phrases.seconds(price.hidden)} of it under the dispatch"
        )
    if price.traffic:
        told.append(f"in chunks: {_overlap(price)}")
    return told


def traffic(each: Traffic) -> str:
    """One dimension's volume: ``node (ib-ndr): dispatch 440 MB, combine 440 MB``."""
    backward = f", backward {size(each.backward)}" if each.backward else ""
    return f"{each.dim} ({each.link}): dispatch {size(each.dispatch)}, combine {size(each.combine)}{backward}"


def columns(plan: FormPlan) -> list[str]:
    """Heads of the table of forms: one column of volumes for each dimension of the mesh that holds experts."""
    mesh = plan.workload.mesh
    dims = () if mesh is None else (*mesh.levels, *mesh.slices)
    return ["form", "block", "experts", "links", "other", *(f"over {dim.name}" for dim in dims), "buffers", "saved", ""]


def rows(plan: FormPlan) -> list[list[str]]:
    """A row of cells for each form that has a price, as ``columns``; saved bytes only where the block trains."""
    return [_row(option, option.predicted, plan.form) for option in plan.options if option.predicted is not None]


def refusals(plan: FormPlan) -> list[str]:
    """Why forms are not possible; forms with the same reason share a line."""
    alike: dict[str, list[str]] = {}
    for option in plan.options:
        if not option.legal and option.reason not in ("several_ranks", "one_rank"):
            alike.setdefault(f"{option.reason} ({option.detail})", []).append(option.form)
    return [f"not possible: {', '.join(forms)}: {reason}" for reason, forms in alike.items()]


def links(mesh: MeshSpec) -> str:
    """What is assumed of the links."""
    told = "; ".join(f"{dim.name}: {link(dim.link)}" for dim in (*mesh.levels, *mesh.slices))
    return (
        f"links of a rank, each direction: {told or 'none'}. Traffic of other mesh dimensions is not priced; all wait "
        "for the busiest rank"
    )


def link(found: Link) -> str:
    """A link's figures and where they come from."""
    if found.fits:
        best = ", ".join(
            f"{fit.collective} {size(fit.bandwidth)}/s and {phrases.seconds(fit.latency)} a step" for fit in found.fits
        )
        return f"{found.name} ({found.source}: {best})"
    return f"{found.name} {size(found.bandwidth)}/s and {phrases.seconds(found.latency)} a step ({found.source})"


def assumptions(report: PlanReport) -> list[str]:
    """A line for each mesh of the report."""
    return [links(mesh) for mesh in dict.fromkeys(s.ep.workload.mesh for s in report.sites if s.ep) if mesh]


def add(branch: Tree, plan: FormPlan) -> None:
    """The form of one entry as a part of the text view's tree."""
    style = "bold red" if plan.form is None else "green"
    node = branch.add(Text(f"{plan.tokens}, {'train' if plan.workload.train else 'infer'}: {title(plan)}", style))
    for line in lines(plan):
        node.add(Text(line))
    if found := rows(plan):
        table = Table(*columns(plan), box=None, padding=(0, 2, 0, 0))
        for row in found:
            table.add_row(*row)
        node.add(table)
    for line in refusals(plan):
        node.add(Text(line, "dim"))


def _row(option: FormOption, price: FormPrice, chosen: str | None) -> list[str]:
    times = (price.total, price.compute, price.communication, price.overhead)
    return [
        option.form,
        *(phrases.seconds(value) if value else "-" for value in times),
        *(size(each.total) if each.total else "-" for each in price.traffic),
        size(price.buffer_bytes) if price.buffer_bytes else "-",
        size(price.saved_bytes) if price.saved_bytes else "-",
        "chosen" if option.form == chosen else "" if option.legal else "not possible",
    ]


def _overlap(price: FormPrice) -> str:
    """What cutting the tokens does."""
    cut = price.overlap
    if cut.chunks == 1:
        return cut.reason
    return f"{cut.reason} ({phrases.seconds(cut.total)}, {phrases.seconds(cut.hidden)} of communication behind experts)"
