"""The plot: the best HF side under Inductor over moepass, a panel for each dtype and mode, a line for each shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> bool:
    """Write an SVG; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"no chart: {path.name} needs matplotlib")
        return False
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "cpu_moe", "font.size": 9}
    from matplotlib import pyplot

    dtypes, modes, shapes = (list(dict.fromkeys(r[key] for r in rows)) for key in ("dtype", "mode", "shape"))
    size = (3.6 * len(modes), 2.9 * len(dtypes))
    figure, axes = pyplot.subplots(
        len(dtypes), len(modes), figsize=size, squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    for (i, dtype), (j, mode) in itertools.product(enumerate(dtypes), enumerate(modes)):
        axis = axes[i][j]
        for style, shape in enumerate(shapes):
            of = sorted((r for r in rows if (r["dtype"], r["mode"], r["shape"]) == (dtype, mode, shape)), key=_tokens)
            points = [(r["T"], r["HF / moepass"]) for r in of if not math.isnan(r["HF / moepass"])]
            if points:
                axis.plot(*zip(*points, strict=True), ("-", "--", "-.", ":")[style % 4], marker=".", label=shape)
        axis.axhline(1.0, color="black", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        for along in (axis.xaxis, axis.yaxis):
            along.set_major_formatter("{x:g}")
        axis.set_title(f"{dtype}, {mode}", fontsize=9)
        axis.grid(visible=True, alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("tokens T")
    for axis in axes[:, 0]:
        axis.set_ylabel("best HF / moepass")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def _tokens(row: Mapping[str, Any]) -> int:
    return int(row["T"])
