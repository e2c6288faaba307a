"""Charts of a plan report as SVG text: time of every lowering over T, and where each stands under the roofline.

Drawn by matplotlib (``pip install moepass[charts]``) from the report's sweeps; without it the page says so.  The text
is deterministic: ids are salted with a constant, and there is no date in it.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moepass import errors
from moepass.explain import phrases
from moepass.lowering.plan import Curve, Sweep

if TYPE_CHECKING:
    from moepass.explain.report import SitePlan

#: One colour per lowering, readable on light and dark paper (Okabe and Ito 2008), and a line style for printing.
_STYLE = {
    "dense": ("#0072b2", "-"),
    "gathered": ("#e69f00", "--"),
    "grouped": ("#009e73", "-."),
    "capacity": ("#cc79a7", ":"),
}
_OTHER = ("#d55e00", "-")
_SIZE = (7.2, 3.6)
#: What matplotlib would write beside the title.
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def time_chart(sweep: Sweep, entries: Sequence[SitePlan] = ()) -> str:
    """Seconds over T, both logarithmic; the chosen lowering's ranges are shaded; measured times are dots.

    ``entries``: of the site, for their measured times.  Raises ``MissingPackage``.
    """
    figure, axes = _figure()
    for choice in sweep.choices:
        low, high = max(choice.tokens.low, sweep.tokens[0]), sweep.tokens[-1]
        if choice.tokens.high is not None:
            high = min(high, choice.tokens.high + 1)  # up to where the next range begins
        colour = _STYLE.get(choice.lowering, _OTHER)[0]
        axes.axvspan(low, max(high, low), color=colour, alpha=0.14, linewidth=0)
    for curve in sweep.curves:
        tokens, seconds = _defined(sweep.tokens, curve.seconds)
        if tokens:
            colour, line = _STYLE.get(curve.lowering, _OTHER)
            axes.plot(tokens, seconds, line, color=colour, label=curve.lowering)
    for name, tokens, seconds in _measured(entries):
        axes.plot(tokens, seconds, "o", color=_STYLE.get(name, _OTHER)[0], label=f"{name}, measured")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    axes.set_xlabel("tokens T")
    axes.set_ylabel("estimated seconds")
    axes.legend(fontsize=8)
    return _svg(figure, f"Estimated time of every lowering over tokens on {sweep.hardware}; shaded: chosen")


def roofline(sweep: Sweep) -> str:
    """Attained FLOP/s over FLOPs per byte, one path over T for each lowering, under the machine's roof.

    Source: Williams, Waterman, Patterson 2009.  Raises ``MissingPackage``.
    """
    figure, axes = _figure()
    intensities = [x for curve in sweep.curves for x, _ in _roofline_points(curve)]
    low, high = min(intensities, default=1.0) / 2, max(intensities, default=1.0) * 2
    ridge = sweep.peak / sweep.bandwidth
    roof = sorted({low, ridge, max(high, 2 * ridge)})
    axes.plot(roof, [min(sweep.peak, x * sweep.bandwidth) for x in roof], color="#777777", linewidth=2, label="roof")
    for curve in sweep.curves:
        points = _roofline_points(curve)
        if points:
            colour, line = _STYLE.get(curve.lowering, _OTHER)
            axes.plot(*zip(*points, strict=True), f"{line}", marker=".", color=colour, label=curve.lowering)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte")
    axes.set_ylabel("FLOP/s (estimated)")
    axes.legend(fontsize=8)
    return _svg(figure, f"Roofline of {sweep.hardware} in {sweep.workload.dtype}: one point per token count")


def _roofline_points(curve: Curve) -> list[tuple[float, float]]:
    rows = zip(curve.flops, curve.bytes, curve.seconds, strict=True)
    return [(f / b, f / s) for f, b, s in rows if f and b and s]


def _defined(tokens: Sequence[int], values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    pairs = [(t, v) for t, v in zip(tokens, values, strict=True) if v is not None]
    return [t for t, _ in pairs], [v for _, v in pairs]


def _measured(entries: Sequence[SitePlan]) -> list[tuple[str, list[int], list[float]]]:
    found: dict[str, tuple[list[int], list[float]]] = {}
    for entry in entries:
        if entry.workload is None:
            continue
        for alternative in entry.alternatives:
            if alternative.measured is not None:
                tokens, seconds = found.setdefault(alternative.lowering, ([], []))
                tokens.append(entry.workload.tokens)
                seconds.append(alternative.measured)
    return [(name, tokens, seconds) for name, (tokens, seconds) in sorted(found.items())]


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise errors.MissingPackage(what="a chart", package="matplotlib", install="moepass[charts]") from None
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, which="major", alpha=0.3)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    """The ``<svg>`` element alone, with a title for readers that cannot see it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "moepass", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_METADATA | {"Title": title})
    text = buffer.getvalue()
    return _own_ids(text[text.index("<svg") :].replace("<svg ", '<svg role="img" ', 1).strip())


def _own_ids(svg: str) -> str:
    """Ids that no other chart of the same page has: they start with a digest of the chart."""
    prefix = f"c{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    return re.sub(r'(\bid="|href="#|url\(#)', lambda match: match[1] + prefix, svg)


def caption(sweep: Sweep) -> str:
    """What a chart shows, in words: the chosen lowering for each range."""
    chosen = "; ".join(f"{choice.tokens}: {choice.lowering}" for choice in sweep.choices)
    return f"{phrases.shape(sweep.workload)}, {sweep.workload.routing} routing, on {sweep.hardware}. Chosen: {chosen}"
