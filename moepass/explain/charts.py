"""Charts of a plan report as SVG text: time of every lowering over T, the roofline, the load of the experts.

Drawn by matplotlib (``pip install moepass[charts]``) from the report's sweeps and analysis; without it the page says
so.  The text is deterministic: ids are salted with a constant, and there is no date in it.  Lines and letters have the
colour of the text around the chart, so it reads on light and dark pages alike.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

from moepass import errors
from moepass.explain import phrases
from moepass.lowering.plan import Curve, Sweep

if TYPE_CHECKING:
    from moepass.explain.analysis import SiteAnalysis

#: One colour per lowering, readable on light and dark paper (Okabe and Ito 2008), and a line style for printing.
_STYLE = {
    "dense": ("#0072b2", "-"),
    "gathered": ("#e69f00", "--"),
    "grouped": ("#009e73", "-."),
    "capacity": ("#cc79a7", ":"),
    "fused": ("#d55e00", "-"),
    "fused_recompute": ("#d55e00", ":"),
}
_OTHER = ("#56b4e9", "-")
#: Inches of 72 points: at its own size on a phone, half again as large on a desk.
_SIZE = (4.7, 3.3)
#: Stands for the colour of the text around the chart; no colour of ours.
_INK = "#010203"
_STYLE_SHEET: Any = {
    "svg.hashsalt": "moepass",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
#: What matplotlib would write beside the title.
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


P = ParamSpec("P")


def _styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw in our style, whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        if not available():
            raise errors.MissingPackage(what="a chart", package="matplotlib", install="moepass[charts]")
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE_SHEET)
            return draw(*args, **kwargs)

    return styled


#: A measured time: lowering, T, seconds.
Measured = tuple[str, int, float]


@_styled
def time_chart(sweep: Sweep, measured: Sequence[Measured] = ()) -> str:
    """Seconds over T, both logarithmic; the chosen lowering's ranges are shaded; measured times are dots.

    Raises ``MissingPackage``.
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
    for name in sorted({name for name, _, _ in measured}):
        dots = sorted((T, s) for each, T, s in measured if each == name)
        colour = _STYLE.get(name, _OTHER)[0]
        axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=5, label=f"{name}, measured")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    axes.set_xlabel("tokens T")
    axes.set_ylabel("seconds: lines estimated, dots measured" if measured else "estimated seconds")
    axes.legend()
    return _svg(figure, f"Estimated time of every lowering over tokens on {sweep.hardware}; shaded: chosen")


@_styled
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
            axes.plot(*zip(*points, strict=True), line, marker=".", color=colour, label=curve.lowering)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte")
    axes.set_ylabel("FLOP/s (estimated)")
    axes.legend()
    return _svg(figure, f"Roofline of {sweep.hardware} in {sweep.workload.dtype}: one point per token count")


def _roofline_points(curve: Curve) -> list[tuple[float, float]]:
    rows = zip(curve.flops, curve.bytes, curve.seconds, strict=True)
    return [(f / b, f / s) for f, b, s in rows if f and b and s]


def _defined(tokens: Sequence[int], values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    pairs = [(t, v) for t, v in zip(tokens, values, strict=True) if v is not None]
    return [t for t, _ in pairs], [v for _, v in pairs]


@_styled
def heat_map(sites: Sequence[SiteAnalysis]) -> str:
    """Load of each expert over its site's mean: a row for each site, a column for each expert.

    The sites have the same number of experts.  Raises ``MissingPackage``.
    """
    rows = [[n * len(site.load) / sum(site.load) for n in site.load] for site in sites]
    figure, axes = _figure(height=min(1.3 + 0.16 * len(rows), 6.0))
    top = max(2.0, *(max(row) for row in rows))
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="none")
    axes.grid(visible=False)
    axes.set_xlabel("expert")
    axes.set_ylabel("site")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("load / mean")
    bar.outline.set_visible(False)
    return _svg(figure, "Load of each expert over the mean of its site, measured")


def _figure(height: float = _SIZE[1]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, which="major", alpha=0.3)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    """The ``<svg>`` element alone, with a title for readers that cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_METADATA | {"Title": title})
    text = buffer.getvalue().replace(_INK, "currentColor")
    return _own_ids(text[text.index("<svg") :].replace("<svg ", '<svg role="img" ', 1).strip())


def _own_ids(svg: str) -> str:
    """Ids that no other chart of the same page has: they start with a digest of the chart."""
    prefix = f"c{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    return re.sub(r'(\bid="|href="#|url\(#)', lambda match: match[1] + prefix, svg)


def inline(svg: str) -> str:
    """A chart for the inside of a page: without the namespaces and metadata that only a file of its own needs."""
    bare = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    return re.sub(r' (xmlns(:\w+)?|width|height)="[^"]*"', "", bare[: bare.index(">")]) + bare[bare.index(">") :]


def caption(sweep: Sweep) -> str:
    """What a chart shows, in words: the chosen lowering for each range."""
    chosen = "; ".join(f"{choice.tokens}: {choice.lowering}" for choice in sweep.choices)
    return f"{phrases.shape(sweep.workload)}, {sweep.workload.routing} routing, on {sweep.hardware}. Chosen: {chosen}"
