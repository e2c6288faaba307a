"""The plot: TFLOP/s over T of ours and every peer, one panel for each shape and mode (random routing)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.gpu.cells import SHAPES, SMALL, Cell
from benchmarks.gpu.sides import OURS, is_peer


def draw(rows: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Write an SVG; without rows, or without matplotlib, none."""
    panels = sorted({(r["shape"], r["mode"]) for r in rows})
    pyplot = common.pyplot(path, "gpu_moe") if panels else None
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, (shape, mode) in zip(axes[0], panels, strict=True):
        for side, points in _lines(rows, shape, mode).items():
            ours = side == OURS
            axis.plot(*zip(*points, strict=True), label=side, lw=2.5 if ours else 1, marker="o" if ours else ".",
                      color="black" if ours else None)  # fmt: skip
        axis.set(yscale="log", xlabel="T", title=f"{shape}, {mode}")
        axis.set_xscale("log", base=2)
    axes[0][0].set_ylabel("TFLOP/s")
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _lines(rows: Sequence[dict[str, Any]], shape: str, mode: str) -> dict[str, list[tuple[int, float]]]:
    """Points (T, TFLOP/s) by side; our lowerings are not peers of our own plan."""
    shapes = {s.name: s for s in (*SHAPES, *SMALL)}
    found: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda r: r["T"]):
        if (row["shape"], row["mode"], row["routing"]) != (shape, mode, "random"):
            continue
        flops = Cell(shapes[shape], row["T"], mode != "forward", "random").flops
        for side, seconds in row["seconds"].items():
            if side == OURS or is_peer(side):
                found.setdefault(side, []).append((row["T"], flops / seconds / 1e12))
    return found
