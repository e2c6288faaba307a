"""One MoE block on a CPU: regret of the planner's choice, and moepass beside every Hugging Face implementation.

The grid is T x shape x dtype x mode.  Sides, with equal weights, in turns in one process: every legal lowering of
moepass, pinned by a plan and compiled through ``torch.compile(..., backend="moepass")``, and stock transformers'
``grouped_mm``, ``batched_mm`` and ``eager``, plain and under Inductor.  Graphs are compiled once for a dynamic T (and
once for T = 1, which ``torch.compile`` keeps apart).  What the planner chooses is read from ``moepass.last_plan()``.
Before a group is timed, every side's results (with all gradients) are compared with HF's plain loop in float32; one
that differs is named and not timed.  The machine's GEMM rate and read bandwidth are measured beside every group.

Run ``moepass calibrate`` before: the notes say which profile planned.  All four shapes take under 20 minutes on two
cores once Inductor's caches hold their graphs; ``--compile`` only fills those, once for a version of the code.
``--budget`` lowers the number of repeats, not the grid.

    python -m benchmarks.cpu_moe --compile
    python -m benchmarks.cpu_moe [--budget 18] [--run NAME] [--tokens 1,64] [--shapes olmoe] [--dtypes float32]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.cpu import chart, clock, sides, verdict
from benchmarks.cpu.cells import DTYPES, MODES, SHAPES, TINY, TOKENS, TRAIN, Cell, Shape
from benchmarks.cpu.sides import OURS, Side
from moepass.lowering.hardware import load_hardware
from moepass.lowering.plan import Workload
from moepass.lowering.registry import lowerings

#: Seconds that compiling and checking a group is expected to take, before the first was seen.
COMPILE = 35.0
#: Numbers of tokens at which sides are compared with the reference, one for each graph; forward, ours at one more.
COMPARED = 2
#: Part of the time that turns may take; the rest is for first calls, and for sides that are far behind.
TIMED = 0.6
#: Seconds that a cell's turns may take whatever is left of the budget: the median of a few short runs says nothing.
LEAST = 0.7


@dataclass
class Budget:
    """Shares the time that is left out among the cells that are left, by the work they hold."""

    end: float
    left: float
    groups: int
    compile: float = COMPILE

    def share(self, weight: float) -> float:
        """Seconds for timing a cell of that weight."""
        free = max(0.0, self.end - time.monotonic() - self.groups * self.compile)
        seconds = TIMED * free * weight / self.left if self.left > 0 else 0.0
        self.left -= weight
        return max(LEAST, seconds)


def weight(cell: Cell, flops: float = 1e11, bandwidth: float = 1e10) -> float:
    """Seconds of one call by a rough floor, and a little for every call: what cells cost beside each other."""
    return 0.1 + cell.flops / flops + cell.active_bytes * (3 if cell.train else 1) / bandwidth


def legal(cell: Cell) -> list[str]:
    """The lowerings that may serve a block here."""
    s, dtype = cell.shape, str(cell.dtype).removeprefix("torch.")
    work = Workload(tokens=cell.tokens, D=s.D, F=s.F, E=s.E, K=s.K, n=2, dtype=dtype, train=cell.train)
    return [name for name, lowering in lowerings().items() if lowering.legal(work).legal]


def checked(made: Sequence[Side], reference: Side, cells: Sequence[Cell]) -> tuple[list[Side], dict[str, str]]:
    """The sides that agree with the reference in these cells, and what is wrong with the others; compiles them."""
    wrong: dict[str, str] = {}
    for i, cell in enumerate(cells):
        truth = reference.step(cell)()
        for side in made:
            known = i >= COMPARED and side.family == "HF"
            if known or side.name in wrong or side.refuses(cell):
                continue
            try:
                off = sides.error(side.step(cell)(), truth)
            except Exception as error:  # a peer that cannot run here is a finding, not the end
                wrong[side.name] = clock.first_line(error)
                continue
            if not off <= sides.TOLERANCE[cell.dtype]:
                wrong[side.name] = f"differs from HF's plain loop by {off:.1e} of the norm at T = {cell.tokens}"
    return [side for side in made if side.name not in wrong], wrong


def group(
    shape: Shape, dtype: torch.dtype, mode: str, tokens: Sequence[int], budget: Budget, repeats: int, inner: str
) -> Iterator[dict[str, Any]]:
    """The rows of one block, dtype and mode."""
    began = time.monotonic()
    cells = [Cell(shape, T, dtype, mode == TRAIN) for T in tokens]
    ceiling = clock.ceilings(dtype, min(2048, 4 * shape.D))
    chosen = sides.choices(shape, dtype, tokens, mode == TRAIN)
    compared = cells[:COMPARED] if mode == TRAIN else cells[: COMPARED + 1]
    made, wrong = checked(sides.make(shape, dtype, legal(cells[-1]), inner), sides.reference(shape, dtype), compared)
    budget.groups -= 1
    budget.compile = max(time.monotonic() - began, budget.compile / 2)
    known = clock.Group()
    for cell in cells:
        found = clock.measure(made, cell, known, budget.share(weight(cell)), repeats)
        lowering = str(chosen[cell.tokens].lowering)
        seconds = {name: timing.median for name, timing in found.timings.items()}
        row: dict[str, Any] = {
            "shape": shape.name,
            "T": cell.tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "mode": mode,
            "chosen": lowering,
            "decided by": chosen[cell.tokens].decided_by,
            "seconds": seconds,
            "quartiles": {name: [t.low, t.high] for name, t in found.timings.items()},
            "repeats": {name: t.repeats for name, t in found.timings.items()},
            "not run": wrong | found.not_run,
            "ceilings": ceiling,
            "group compiled and checked [s]": budget.compile,
        }
        yield row | verdict.judged(cell, seconds, lowering, ceiling)
    torch.compiler.reset()
    gc.collect()


def compile_all(groups: Sequence[tuple[Shape, torch.dtype, str]], inner: str) -> None:
    """Fill Inductor's caches: every side of every group, for T = 1 and for a dynamic T."""
    began = time.monotonic()
    for shape, dtype, mode in groups:
        cells = [Cell(shape, T, dtype, mode == TRAIN) for T in TOKENS[:2]]
        for side in sides.make(shape, dtype, legal(cells[-1]), inner):
            for cell in cells:
                side.step(cell)()
        torch.compiler.reset()
        gc.collect()
        print(f"{(time.monotonic() - began) / 60:5.1f} min  {shape.name} {dtype} {mode}", flush=True)


def say(row: dict[str, Any], began: float) -> None:
    """One line of progress."""
    ours = row["seconds"].get(OURS + row["chosen"], float("nan"))
    minutes = (time.monotonic() - began) / 60
    print(
        f"{minutes:5.1f} min  {row['shape']:12} T={row['T']:<5} {row['dtype']:8} {row['mode']:16} "
        f"{row['chosen']:8} {ours * 1e3:9.2f} ms  regret {row['regret']:.2f}  HF {row['HF / moepass']:.2f}x "
        f"({row['best HF']})" + (f"  not run: {', '.join(row['not run'])}" if row["not run"] else ""),
        flush=True,
    )


def notes(rows: Sequence[dict[str, Any]], minutes: float) -> list[str]:
    """Targets, and how the numbers were made."""
    hw = load_hardware()
    rates = {}
    for row in rows:
        rates.setdefault(row["dtype"], []).append(row["ceilings"])
    own = [
        f"{dtype} GEMM {statistics.median(c['flops'] for c in of) / 1e9:.0f} GFLOP/s, "
        f"read {statistics.median(c['bandwidth'] for c in of) / 1e9:.1f} GB/s"
        for dtype, of in rates.items()
    ]
    refused = {f"{name}: {why}" for row in rows for name, why in row["not run"].items() if "predicted" not in why}
    predicted = sum("predicted" in why for row in rows for why in row["not run"].values())
    return [
        *verdict.verdicts(rows),
        f"planned with the profile {hw.name} ({hw.source}), {len(hw.facts)} measured facts; moepass is the pinned side "
        "of the lowering that the planner chose",
        "medians; sides take turns; repeats and quartiles of every side are in the JSON; a side over 3x the fastest is "
        f"timed twice, or once where a call takes over {clock.LONG:g} s; one over {clock.SLOW:g} s once",
        f"this machine in the same run: {'; '.join(own)}",
        f"not run: {predicted} times a side predicted, from a smaller T, over {clock.SLOW:g} s and "
        f"{clock.HOPELESS:g}x its family's fastest, or no faster than one that is over {clock.SLOW:g} s itself, "
        f"or over {clock.LONGEST:g} s",
        *(f"not run in some cells: {why}" for why in sorted(refused)),
        f"{len(rows)} cells in {minutes:.1f} minutes, compiling included",
    ]


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Measure the grid and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma-separated T")
    parser.add_argument("--shapes", default=",".join(s.name for s in SHAPES), help="or 'tiny', to try the command")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--budget", type=float, default=18.0, help="minutes in all; less time, fewer repeats")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of a side that is not far behind")
    parser.add_argument("--inner", default="inductor", help="'eager' tries the command in seconds; needs --out")
    parser.add_argument("--run", default="", help="write to cpu_moe_RUN, beside other runs")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--compile", action="store_true", help="only fill Inductor's caches; measure nothing")
    args = parser.parse_args(argv)

    if args.out is None and (args.inner != "inductor" or TINY.name in args.shapes):
        parser.error("a trial writes no results of its own: give --out DIR")
    known = {s.name: s for s in (*SHAPES, TINY)}
    shapes = [known[name] for name in args.shapes.split(",")]
    dtypes = [getattr(torch, name) for name in args.dtypes.split(",")]
    tokens = sorted(map(int, args.tokens.split(",")))
    groups = list(itertools.product(shapes, dtypes, args.modes.split(",")))
    if args.compile:
        compile_all(groups, args.inner)
        return None
    about, rows, began = common.machine(), [], time.monotonic()
    total = sum(weight(Cell(s, T, dtype, mode == TRAIN)) for s, dtype, mode in groups for T in tokens)
    budget = Budget(began + 60 * args.budget, total, len(groups))
    for shape, dtype, mode in groups:
        for row in group(shape, dtype, mode, tokens, budget, args.repeats, args.inner):
            rows.append(row)
            say(row, began)
    name = f"cpu_moe_{args.run}" if args.run else "cpu_moe"
    title = "One MoE block on a CPU: the planner's choice, and the best Hugging Face implementation over moepass"
    path = common.write(
        name,
        [verdict.line(row) for row in rows],
        title=title,
        notes=notes(rows, (time.monotonic() - began) / 60),
        about=about,
        out=args.out,
        extra={"cells": rows, "overview": verdict.overview(rows), "each HF side": verdict.each(rows)},
        summary=[verdict.overview(rows), verdict.each(rows)],
    )
    if chart.draw(rows, path.with_suffix(".svg"), title=f"{about['cpu']}, {about['cores']} cores"):
        print(f"chart: {path.with_suffix('.svg')}")
    return path


if __name__ == "__main__":
    main()
