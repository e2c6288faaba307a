"""What the timings of ``benchmarks.cpu_moe`` say: regret, ratios to Hugging Face, shares of the machine, targets.

Ratios are HF's time over ours: above 1 moepass is faster.  Ours is the lowering that the planner chose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.common import geometric_mean
from benchmarks.cpu.cells import Cell
from benchmarks.cpu.sides import INDUCTOR, OURS

Row = Mapping[str, Any]
NAN = math.nan


def judged(cell: Cell, seconds: Mapping[str, float], chosen: str, ceiling: Mapping[str, float]) -> dict[str, Any]:
    """Regret of the choice, the best compiled HF side, and ratios to the machine's own rates; NaN where unknown."""
    ours = seconds.get(OURS + chosen, NAN)
    lowerings = {name: s for name, s in seconds.items() if name.startswith(OURS)}
    rivals = {name: s for name, s in seconds.items() if name.endswith(INDUCTOR)}
    best = min(rivals, key=rivals.__getitem__, default=None)
    large, one = cell.tokens >= 1024, cell.tokens == 1 and not cell.train
    return {
        "regret": ours / min(lowerings.values(), default=NAN),
        "best lowering": min(lowerings, key=lowerings.__getitem__, default="none").removeprefix(OURS),
        "best HF": best or "none ran",
        "HF / moepass": rivals[best] / ours if best else NAN,
        "of the GEMM rate": cell.flops / ours / ceiling["flops"] if large else NAN,
        "over reading the weights": ours * ceiling["bandwidth"] / cell.active_bytes if one else NAN,
    }


def line(row: Row) -> dict[str, Any]:
    """The columns of a cell in the table; milliseconds."""
    ms = {name: s * 1e3 for name, s in row["seconds"].items()}
    kept = {key: row[key] for key in ("shape", "T", "dtype", "mode", "chosen", "best lowering", "regret")}
    kept["moepass [ms]"] = ms.get(OURS + row["chosen"], NAN)
    kept |= {
        "best HF": row["best HF"],
        "best HF [ms]": ms.get(row["best HF"], NAN),
        "HF / moepass": row["HF / moepass"],
    }
    return kept | {key: row[key] for key in ("of the GEMM rate", "over reading the weights")}


def parts(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """All cells, those of each dtype and mode, and of each pair of them."""
    found = {"all": list(rows)}
    keys: list[Callable[[Row], str]] = [
        lambda r: str(r["dtype"]),
        lambda r: str(r["mode"]),
        lambda r: f"{r['dtype']}, {r['mode']}",
    ]
    for key in keys:
        for row in rows:
            found.setdefault(key(row), []).append(row)
    return found


def overview(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for each part of the grid."""
    return [{"cells": f"{name} ({len(of)})"} | figures(of) for name, of in parts(rows).items()]


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers that targets are about; NaN where there is nothing to take them from."""
    regrets = _known(r["regret"] for r in rows)
    ratios = _known(r["HF / moepass"] for r in rows)
    middle = _known(r["HF / moepass"] for r in rows if 4 <= r["T"] <= 256)
    gemm = _known(r["of the GEMM rate"] for r in rows)
    reading = _known(r["over reading the weights"] for r in rows)
    return {
        "regret <= 1.05": sum(r <= 1.05 for r in regrets) / len(regrets) if regrets else NAN,
        "worst regret": max(regrets, default=NAN),
        "best HF / moepass": geometric_mean(ratios) if ratios else NAN,
        "the same, 4 <= T <= 256": geometric_mean(middle) if middle else NAN,
        "worst": min(ratios, default=NAN),
        "GEMM rate, T >= 1024: mean": geometric_mean(gemm) if gemm else NAN,
        "lowest": min(gemm, default=NAN),
        "T = 1 over reading: worst": max(reading, default=NAN),
    }


def each(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Geometric mean over ours of every HF side by itself, with the number of cells where it ran."""
    names = sorted({name for r in rows for name in r["seconds"] if not name.startswith(OURS)})
    found = []
    for name in names:
        line: dict[str, Any] = {"HF side over moepass": name}
        for part, of in parts(rows).items():
            ratios = _known(r["seconds"][name] / _ours(r) for r in of if name in r["seconds"])
            line[part] = f"{geometric_mean(ratios):.2f} ({len(ratios)} cells)" if ratios else "never ran"
        found.append(line)
    return found


#: A column of ``figures``, whether more is better, the target, and how it is said.
TARGETS: tuple[tuple[str, bool, float, str], ...] = (
    ("regret <= 1.05", True, 0.95, "share of cells where the choice is within 1.05x of the best lowering"),
    ("worst regret", False, 1.25, "worst regret"),
    ("best HF / moepass", True, 1.3, "the best HF side under Inductor over moepass, geometric mean"),
    ("the same, 4 <= T <= 256", True, 1.6, "the same for 4 <= T <= 256"),
    ("worst", True, 0.95, "the same, worst cell"),
    ("lowest", True, 0.8, "share of the machine's GEMM rate at T >= 1024, lowest"),
    ("T = 1 over reading: worst", False, 1.5, "time at T = 1 over that of reading the active weights once, worst"),
)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence for each target: the number, the target, met or missed."""
    found = figures(rows)
    said = [_sentence(found[key], more, target, what) for key, more, target, what in TARGETS]
    for name in sorted({name for r in rows for name in r["seconds"] if not name.startswith(OURS)}):
        ratios = _known(r["seconds"][name] / _ours(r) for r in rows if name in r["seconds"])
        if ratios:
            said.append(_sentence(geometric_mean(ratios), True, 1.8, f"HF {name} over moepass, {len(ratios)} cells"))
    return said


def _sentence(value: float, more: bool, target: float, what: str) -> str:
    if math.isnan(value):
        return f"{what}: not measured here"
    met = value >= target if more else value <= target
    return f"{what}: {value:.3g} (target: at {'least' if more else 'most'} {target:g}; {'met' if met else 'MISSED'})"


def _ours(row: Row) -> float:
    return float(row["seconds"].get(OURS + row["chosen"], NAN))


def _known(values: Iterable[float]) -> list[float]:
    return [v for v in values if not math.isnan(v)]
