"""A bounded search for better tiles: coordinate descent from the rule, each step one halving or doubling.

The row tiles of up and down go together, and those of hidden and dx.  A step, a tile's size or its form (persistent
programs, TMA descriptors, rows weighted by the down projection), is taken where it gains more than ``GAIN``; tiles that
do not compile, do not fit or give other numbers than the rule's are infinitely slow.  The clock is an argument: the
search is tested without an accelerator.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import clock
from benchmarks.gpu.cells import Cell, leaves, route
from benchmarks.gpu.check import TOLERANCE
from benchmarks.gpu.sides import Bench
from moepass.kernels.fused import ops, runner, schedule, schedule_decode
from moepass.kernels.fused.launch import Program
from moepass.kernels.fused.problem import Needs, Problem, Target, Tile, Tiles
from moepass.kernels.fused.schedule_backward import backward
from moepass.kernels.fused.tuning import Entry, Table, bucket, folder, key, merged, read

#: A step must save this share of the time.
GAIN = 0.02
FORWARD, BACKWARD = ("up", "down"), ("hidden", "dx", "dw")
#: Forms besides pointers and a program per tile; few candidates fit into the seconds of a cell, so all kernels at once.
FORMS: tuple[dict[str, Any], ...] = ({"tma": 2}, {"persistent": 1, "tma": 2}, {"persistent": 1})
_SIZES = {"m": (16, 128), "n": (32, 256), "k": (32, 128)}


def search(
    start: Tiles, kernels: tuple[str, ...], seconds: Callable[[Tiles], float], deadline: float
) -> tuple[Tiles, float, float]:
    """The best tiles found before ``deadline`` (of ``time.monotonic``), their seconds, and those of ``start``."""
    first = best = seconds(start)
    tiles, tried = start, {start}
    while time.monotonic() < deadline:
        for candidate in moves(tiles, kernels):
            if candidate in tried or time.monotonic() >= deadline:
                continue
            tried.add(candidate)
            found = seconds(candidate)
            if found < best * (1 - GAIN):
                tiles, best = candidate, found
                break
        else:
            break
    return tiles, best, first


def moves(tiles: Tiles, kernels: tuple[str, ...]) -> Iterator[Tiles]:
    """Every tile set one step away; first, while no kernel has another form, each form for all of them at once."""
    formed = [name for name in kernels if name != "dw"]
    if not any(getattr(tiles, name).persistent or getattr(tiles, name).tma for name in formed):
        for fields in FORMS if formed else ():
            yield tiles._replace(**{name: _formed(name, getattr(tiles, name), fields) for name in formed})
    for pair in {"up": FORWARD, "hidden": ("hidden", "dx"), "dw": ("dw",)}.values():
        if pair[0] in kernels:
            for m in _steps(getattr(tiles, pair[0]).m, *_SIZES["m"]):
                yield tiles._replace(**{name: getattr(tiles, name)._replace(m=m) for name in pair})
    for name in kernels:
        tile: Tile = getattr(tiles, name)
        options = [{axis: size} for axis in ("n", "k") for size in _steps(getattr(tile, axis), *_SIZES[axis])]
        options += [{"warps": w} for w in _steps(tile.warps, 4, 8)]
        options += [{"stages": s} for s in (tile.stages - 1, tile.stages + 1) if 2 <= s <= 5]
        if name == "down":
            options += [{"weigh": not tile.weigh}]
        if name != "dw":
            options += [{"persistent": p} for p in (tile.persistent + 1, tile.persistent - 1) if 0 <= p <= 2]
            options += [{"tma": level} for level in (tile.tma + 1, tile.tma - 1) if 0 <= level <= 2]
        for option in options:
            yield tiles._replace(**{name: tile._replace(**option)})


def _formed(name: str, tile: Tile, fields: Mapping[str, Any]) -> Tile:
    """The tile in another form.  Wider than 64 columns, a persistent up projection spills."""
    narrow = {"n": min(tile.n, 64)} if name == "up" and "persistent" in fields else {}
    return tile._replace(**fields, **narrow)


def _steps(size: int, low: int, high: int) -> list[int]:
    return [s for s in (size // 2, size * 2) if low <= s <= high]


def tune_all(bench: Bench, cells: Iterable[Cell], seconds: float) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Entries for the buckets that the cells fall into, in ``seconds`` altogether, and what each gained."""
    random = sorted((c for c in cells if c.routing == "random"), key=lambda c: c.train)
    problems = [_problem_of(_operands(cell, bench), train=cell.train) for cell in random]
    tiled = [(p, cell) for p, cell in zip(problems, random, strict=True) if not schedule_decode.streams(p)]
    todo = {key(p): cell for p, cell in tiled}  # both directions of a cell that trains
    end, entries, gains = time.monotonic() + seconds, [], []
    for left, cell in zip(range(len(todo), 0, -1), todo.values(), strict=True):
        now = time.monotonic()
        entry, gained = tune(cell, bench, now + max(0.0, end - now) / left)
        gains.append({"shape": cell.shape.name, "T": cell.tokens, "rows": entry.rows, **gained})
        entries += [entry] if entry.tiles else []
    return entries, gains


def install(entries: list[Entry], bench: Bench, versions: dict[str, str]) -> Path | None:
    """Put entries into the tuning table of this machine's target, which serves from now on; its path."""
    if not entries:
        return None
    target = runner.target(bench.w_in.device).name
    path = folder() / f"{target}.json"
    new = Table(target=target, accelerator=torch.cuda.get_device_name(), versions=versions, entries=tuple(entries))
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(merged(read(path), new).model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    ops.reload_tiles()
    return path


def _operands(cell: Cell, bench: Bench) -> ops.Operands:
    x_TD, score_TE = leaves(replace(cell, train=False), bench.w_in.dtype, bench.w_in.device.type)
    return ops.Operands(x_TD, *route(score_TE, cell.shape.K), bench.w_in.detach(), bench.w_out.detach(), None, None)


def _problem_of(operands: ops.Operands, *, train: bool) -> Problem:
    return ops.problem_of(operands, "silu(g)*u", False, train)


def tune(cell: Cell, bench: Bench, deadline: float) -> tuple[Entry, Mapping[str, float]]:
    """The entry for a cell, and seconds before and after by direction."""
    operands = _operands(cell, bench)
    problem = _problem_of(operands, train=cell.train)
    target = runner.target(bench.w_in.device)
    rule = schedule.tiles(problem, target)
    tiles, report = rule, {}
    halves = (FORWARD, BACKWARD)[: 1 + cell.train]
    for n, kernels in enumerate(halves, 1):
        share = time.monotonic() + (deadline - time.monotonic()) / (len(halves) - n + 1)
        timed = _clock(problem, target, operands, backwards=kernels is BACKWARD)
        tiles, after, before = search(tiles, kernels, timed, share)
        report |= {f"{kernels[0]} before": before, f"{kernels[0]} after": after}
    changed = {name: tile for name, tile in tiles._asdict().items() if tile != getattr(rule, name)}
    for first, second in (("up", "down"), ("hidden", "dx")):  # an entry has both or neither
        if {first, second} & set(changed):
            changed |= {first: getattr(tiles, first), second: getattr(tiles, second)}
    shape = cell.shape
    entry = Entry(D=shape.D, F=shape.F, n=2, dtype=problem.dtype, rows=bucket(problem), tiles=changed)
    return entry, report


def _clock(problem: Problem, target: Target, operands: ops.Operands, *, backwards: bool) -> Callable[[Tiles], float]:
    """Seconds of the whole forward or backward program with given tiles; infinite where they are no candidate."""
    device, T = operands.x_TD.device, operands.x_TD.shape[0]
    bindings: dict[str, Tensor | None] = operands.bindings()
    if backwards:
        rule = runner.prepare(schedule.forward(problem, schedule.tiles(problem, target), target))
        saved = runner.run(rule, T, bindings, device)
        bindings |= {"dy_TD": torch.randn_like(operands.x_TD), "z_RN": saved["z_RN"]}

    def made(tiles: Tiles) -> Program:
        return backward(problem, tiles, target, Needs()) if backwards else schedule.forward(problem, tiles, target)

    truth = runner.run(runner.prepare(made(schedule.tiles(problem, target))), T, bindings, device)

    @functools.cache
    def median(program: Program) -> float:
        try:
            runnable = runner.prepare(program)
            if not agree(runner.run(runnable, T, bindings, device), truth):
                return math.inf
            calls = {"": lambda: runner.run(runnable, T, bindings, device)}
            return clock.in_turns(calls, 3, device.type)[""].median
        except Exception:  # does not compile, needs too many resources: no candidate
            return math.inf

    return lambda tiles: median(made(tiles))  # a form that is not legal here gives a program that was timed already


def agree(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> bool:
    """Whether every result is as near to the rule's, whose kernels were checked, as roundings let it be."""
    return all(
        bool((found[name].float() - want.float()).norm() <= TOLERANCE[want.dtype] * want.float().norm())
        for name, want in truth.items()
    )
