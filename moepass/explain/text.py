"""The text view: a tree for terminals and logs.

Layers with equal plans are one branch (``layers.*.mlp  (x32)``).  Below it, one branch per token range: the chosen
lowering, its estimated and measured time, the runner-up with the margin, the guard, and why others were impossible;
of an analysis what was measured at each T, and how the routing spread.
"""

from __future__ import annotations

from rich.console import Group as RichGroup
from rich.console import RenderableType
from rich.text import Text
from rich.tree import Tree

from moepass.explain import forms, observed, phrases
from moepass.explain.groups import Group, group
from moepass.explain.plain import plain, printable
from moepass.explain.report import KernelSource, PlanReport, SitePlan

_STATUS_STYLE = {"lowered": "green", "skipped": "yellow", "fallback": "bold red"}


def render(report: PlanReport, width: int = 120) -> str:
    """The tree as a plain string, lines at most ``width`` characters, trailing newline."""
    return plain(renderable(report), width=width)


def renderable(report: PlanReport) -> RenderableType:
    """The tree with styles, for a rich console."""
    parts: list[RenderableType] = [_header(report)]
    warning = phrases.alarm(report)
    if warning is not None:
        parts.append(_text(f"!! {warning} !!", "bold red"))
    tree = Tree(_text(report.headline, "bold"))
    for sites in group(report):
        _add_group(tree, sites, report)
    parts.append(tree)
    for graph in report.graphs:
        cache = "" if graph.cache is None else f", cache {graph.cache}"
        guards = "; ".join(graph.guards) or "none added by planning"
        parts.append(_text(f"graph {graph.index}: guards {guards}{cache}", "dim"))
    parts.extend(_text(_kernel(kernel), "dim") for kernel in report.kernels)
    parts.extend(_text(f"note: {note}", "yellow") for note in report.notes)
    if report.sites:
        parts.append(_text(phrases.assumptions(report), "dim"))
    if report.analysis is not None:
        parts.append(_text(observed.circumstances(report.analysis), "dim"))
    parts.extend(_text(line, "dim") for line in forms.assumptions(report))
    return RichGroup(*parts)


def _kernel(kernel: KernelSource) -> str:
    """One line; the source is in the JSON and HTML views, and `moepass emit` writes it to files."""
    numbers = ((kernel.registers, "registers"), (kernel.spills, "spills"), (kernel.shared_bytes, "bytes shared"))
    known = "".join(f", {value} {what}" for value, what in numbers if value is not None)
    tokens = "any T" if kernel.tokens is None else str(kernel.tokens)
    return f"kernel {kernel.site} {kernel.name} ({tokens}, {kernel.target}): {kernel.tile}{known}"


def _header(report: PlanReport) -> Text:
    major = report.schema_version.split(".")[0]
    lines = [
        f"moepass plan v{major} ({report.kind})   fingerprint {report.fingerprint}",
        f"moepass {report.moepass_version}   torch {report.torch_version}   hardware {report.hardware}   "
        f"device {report.device}",
    ]
    if report.settings:
        lines.append("settings: " + ", ".join(f"{name}={value}" for name, value in report.settings.items()))
    return Text("\n").join(_text(line) for line in lines)


def _add_group(tree: Tree, sites: Group, report: PlanReport) -> None:
    first = sites.entries[0]
    title = _text(sites.label, "bold cyan")
    if len(sites.ids) > 1:
        title.append(f"  (x{len(sites.ids)})")
    title.append(f"   {first.kind}")
    if first.workload is not None:
        title.append(f"   {phrases.shape(first.workload)}")
    branch = tree.add(title)
    made_of = [f"{name} {value}" for name, value in (("activation", first.activation), ("init", first.init)) if value]
    if made_of:
        branch.add(_text("   ".join(made_of)))
    for entry in sites.entries:
        if entry.status != "lowered":
            _add_left_alone(branch, entry)
            continue
        if entry.ep is not None:
            forms.add(branch, entry.ep)
            continue
        node = _add_lowered(branch, entry)
        for seen in observed.observed(report, sites.ids, entry):
            for sentence in observed.lines(seen):
                node.add(_text(sentence, "magenta"))


def _add_lowered(branch: Tree, entry: SitePlan) -> Tree:
    line = _text(f"{phrases.tokens(entry)}: ")
    line.append_text(_text(phrases.choice(entry), _STATUS_STYLE["lowered"]))
    node = branch.add(line)
    if entry.guard is not None:
        node.add(_text(f"guard: {entry.guard}"))
    if entry.evidence is not None:
        node.add(_text(f"evidence: {entry.evidence}"))
    legal = [a for a in entry.alternatives if a.legal and a.lowering != entry.lowering]
    if len(legal) > 1:
        node.add(_text("slower: " + "; ".join(f"{a.lowering} {phrases.alternative_cost(a)}" for a in legal[1:])))
    for alternative in entry.alternatives:
        if not alternative.legal:
            why = f" ({alternative.detail})" if alternative.detail else ""
            node.add(_text(f"not possible: {alternative.lowering}: {alternative.reason}{why}", "dim"))
    if entry.hint is not None:
        node.add(_text(f"hint: {entry.hint}"))
    return node


def _add_left_alone(branch: Tree, entry: SitePlan) -> None:
    span = "" if entry.tokens is None else f"{phrases.tokens(entry)}: "
    line = _text(span)
    line.append_text(_text(f"{entry.status.upper()} {entry.reason}", _STATUS_STYLE[entry.status]))
    if entry.detail is not None:
        line.append_text(_text(f": {entry.detail}"))
    node = branch.add(line)
    if entry.hint is not None:
        node.add(_text(f"hint: {entry.hint}"))


def _text(content: str, style: str = "") -> Text:
    """Literal text: no markup, and no control characters."""
    return Text(printable(content), style=style)
