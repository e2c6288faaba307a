"""The hardware profile from what was measured: ceilings as they are, GEMM efficiencies fitted to half of the cells.

The other half says how good the fit is: the error of predicted against measured seconds on cells it has not seen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import Workload
from moepass.lowering.registry import lowerings

#: Profile curve -> the lowering whose seconds it decides.
CURVES = {"fused": "fused", "tiles": "grouped"}
_FACTORS = [1.1**i for i in range(-14, 8)]

#: A measured cell: the planner's view of it, and seconds by lowering.
Measured = tuple[Workload, Mapping[str, float]]


def profile(before: Hardware, ceilings: Mapping[str, float], dtype: str, cells: Sequence[Measured]) -> Hardware:
    """``before`` with this machine's ceilings, and efficiency curves fitted to ``cells``."""
    flops = tuple(sorted({**dict(before.flops), dtype: ceilings["flops"]}.items()))
    measured = {"flops": flops, "bandwidth": ceilings["bandwidth"], "launch": ceilings["launch"]}
    hw = before.model_copy(update=measured)
    for curve, lowering in CURVES.items():
        known = [(work, seconds[lowering]) for work, seconds in cells if lowering in seconds]
        if known:
            hw = _fit_curve(hw, curve, lowering, known)
    return hw


def error(hw: Hardware, cells: Sequence[Measured]) -> dict[str, float]:
    """By lowering: the geometric mean of max(predicted, measured) / min of both; 1 is perfect."""
    logs: dict[str, list[float]] = {}
    for work, seconds in cells:
        for name, measured in seconds.items():
            logs.setdefault(name, []).append(abs(_log_ratio(hw, name, work, measured)))
    return {name: math.exp(statistics.fmean(found)) for name, found in sorted(logs.items())}


def halves(cells: Sequence[Measured]) -> tuple[list[Measured], list[Measured]]:
    """Every other cell for the fit, the rest to judge it."""
    return list(cells[::2]), list(cells[1::2])


def workload_of(row: Mapping[str, Any], dtype: str, device: str, shape: Any) -> Workload:
    """The planner's view of a row of results."""
    routing = "random" if row["routing"] == "random" else "skew=1.0"
    return Workload(
        tokens=row["T"], D=shape.D, F=shape.F, E=shape.E, K=shape.K, n=2, dtype=dtype, device=device,
        train=row["mode"] != "forward", routing=routing,
    )  # fmt: skip


def _fit_curve(hw: Hardware, curve: str, lowering: str, known: Sequence[tuple[Workload, float]]) -> Hardware:
    """One point of the curve at a time, the others held; twice around."""
    for _ in range(2):
        for i in range(len(getattr(hw, curve))):
            hw = min((_scaled(hw, curve, i, f) for f in _FACTORS), key=_loss(lowering, known))
    return hw


def _scaled(hw: Hardware, curve: str, i: int, factor: float) -> Hardware:
    points = [list(p) for p in getattr(hw, curve)]
    points[i][1] = min(1.0, points[i][1] * factor)
    return hw.model_copy(update={curve: tuple((rows, share) for rows, share in points)})


def _loss(lowering: str, known: Sequence[tuple[Workload, float]]) -> Callable[[Hardware], float]:
    return lambda hw: sum(_log_ratio(hw, lowering, work, seconds) ** 2 for work, seconds in known)


def _log_ratio(hw: Hardware, lowering: str, work: Workload, measured: float) -> float:
    return math.log(lowerings()[lowering].price(work, hw).total / measured)
