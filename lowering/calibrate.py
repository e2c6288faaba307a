"""Measure this machine in seconds and keep the profile: what ``moepass calibrate`` runs.

CPU: large GEMMs per dtype, GEMMs and mat-vecs with weights that come from memory, copy speed, sorting and moving
rows, and the dispatch cost of the lowerings themselves (fitted on tiny shapes, where nothing else costs).
Accelerators: large GEMMs, grouped GEMMs with one tile of rows an expert, copy speed, sorting and moving rows, launches.

Every figure is the median of many short steps: on a shared machine the minimum is a promise nobody keeps.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moepass import errors
from moepass.kernels.grouped_linear import grouped_linear
from moepass.kernels.rows_linear import rows_linear
from moepass.kernels.sorting import sort_by_expert
from moepass.lowering import cache, machine
from moepass.lowering.hardware import Hardware, forget_default, nearest_preset, profile_file
from moepass.lowering.measure import operands
from moepass.lowering.plan import Workload
from moepass.lowering.registry import lowerings

DTYPES = ("float32", "bfloat16", "float16", "float64")
ROWS = (1, 4, 16, 64, 256)
#: Width of the square weights of a sweep: 1 MiB in float32, as a small expert's.
WIDTH = 512
#: Together the weights of a sweep are larger than most last-level caches, so each GEMM reads its own from memory.
SWEEP_BYTES = 96 << 20

#: Most rows of a grouped product in a sweep: with many rows an expert its weights need not be many.
SWEEP_ROWS = 1 << 12

#: Routed rows of the two sorts whose difference is the cost of a row.
SORTED = (1 << 12, 1 << 16)

Progress = Callable[[str], None]


def calibrate(
    device: str = "cpu",
    *,
    save: bool = True,
    progress: Progress | None = None,
    seconds: float = 0.03,
    sweep_bytes: int = SWEEP_BYTES,
) -> Hardware:
    """This machine's profile.

    ``seconds``      spent on each of about 40 figures (at least three steps each)
    ``sweep_bytes``  size of the weights that are cycled through
    ``save``         keep it where ``load_hardware(None)`` finds it, until versions or thread count change
    Raises ``BadOption`` for a device that is not there.
    """
    _check(device)
    say = progress or (lambda _: None)
    with torch.no_grad():
        hardware = _cpu(say, seconds, sweep_bytes) if device == "cpu" else _accelerator(device, say, seconds)
    if save:
        content = {"machine": machine.describe(device), "profile": hardware.model_dump(mode="json")}
        cache.write(profile_file(device), content)
        forget_default()
    return hardware


def _check(device: str) -> None:
    try:
        torch.empty(1, device=device).add(1)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        detail = str(error).partition("\n")[0]
        raise errors.BadOption(name="device", value=device, detail=f"it cannot be used here ({detail})") from error


def _cpu(say: Progress, seconds: float, sweep_bytes: int) -> Hardware:
    sweeps: dict[str, _Sweep] = {}
    for dtype in DTYPES:
        say(f"{dtype} GEMM and mat-vec")
        sweeps[dtype] = _sweep(dtype, seconds, sweep_bytes)
    say("memory bandwidth, sorting, dispatch")
    fixed = {name: _dispatch(name, seconds) for name in ("grouped", "dense", "gathered", "capacity")}
    return Hardware(
        name=f"cpu-{machine.fingerprint('cpu')[:6]}",
        device="cpu",
        flops=tuple((dtype, s.peak) for dtype, s in sweeps.items()),
        bandwidth=_copy_bandwidth("cpu", sweep_bytes, seconds),
        launch=_launch("cpu", seconds),
        dense=1.0,
        batched=1.0,
        rows=tuple((dtype, s.curve(s.forward)) for dtype, s in sweeps.items()),
        rows_backward=tuple((dtype, s.curve(s.backward)) for dtype, s in sweeps.items()),
        grouped=tuple((dtype, s.curve(s.grouped)) for dtype, s in sweeps.items()),
        grouped_backward=tuple((dtype, s.curve(s.grouped_backward)) for dtype, s in sweeps.items()),
        matvec=tuple((dtype, s.matvec) for dtype, s in sweeps.items()),
        matvec_backward=tuple((dtype, s.matvec_backward) for dtype, s in sweeps.items()),
        fresh=_first_writes(sweep_bytes, seconds),
        per_row=fixed["gathered"][1] / 2,  # two mat-vecs a row
        per_expert=fixed["grouped"][1] / 2,  # two GEMMs an expert
        fixed=tuple((name, intercept) for name, (intercept, _) in fixed.items()),
        sort_row=_sort_row("cpu", seconds),
        gather=_gather_bandwidth("cpu", sweep_bytes, seconds),
        source="calibrated",
        versions=tuple(machine.describe("cpu").items()),
        comment="measured by moepass.lowering.calibrate",
    )


def _accelerator(device: str, say: Progress, seconds: float) -> Hardware:
    preset = nearest_preset(device)
    flops = {}
    for dtype in DTYPES:
        say(f"{dtype} GEMM")
        flops[dtype] = _large_gemm(device, dtype, 8192 if dtype in ("bfloat16", "float16") else 4096, seconds)
    say("grouped GEMM, memory bandwidth, sorting, launches")
    peak = flops["bfloat16"]
    measured = {
        "name": f"{device}-{machine.fingerprint(device)[:6]}",
        "device": device,
        "flops": tuple(flops.items()),
        "bandwidth": _copy_bandwidth(device, 1 << 30, seconds),
        "launch": min(_launch(device, seconds), preset.launch * 4),
        "tiles": _tiles(device, preset.tiles, peak, seconds),
        "sort_row": _sort_row(device, seconds),
        "gather": _gather_bandwidth(device, 1 << 30, seconds),
        "source": "calibrated",
        "versions": tuple(machine.describe(device).items()),
        "comment": f"measured by moepass.lowering.calibrate; what it does not measure is the preset {preset.name}'s",
    }
    return Hardware.model_validate(dict(preset) | measured)


@dataclass(frozen=True)
class _Sweep:
    """One dtype: FLOP/s of a large GEMM and at each of ``ROWS``, forward and backward; bytes/s of mat-vecs."""

    peak: float
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    grouped: tuple[float, ...]
    grouped_backward: tuple[float, ...]
    matvec: float
    matvec_backward: float

    def curve(self, rates: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
        return tuple((float(r), rate / self.peak) for r, rate in zip(ROWS, rates, strict=True))


def _sweep(dtype: str, seconds: float, sweep_bytes: int) -> _Sweep:
    """Weights come from memory: each single product takes the next of a long row, a grouped one takes many."""
    kind: torch.dtype = getattr(torch, dtype)
    weights = torch.rand(WIDTH, WIDTH).to(kind).repeat(max(2, sweep_bytes // (WIDTH * WIDTH * kind.itemsize)), 1, 1)
    single = [_single(weights, r, seconds) for r in ROWS]
    grouped = [_grouped(weights, r, seconds) for r in ROWS]
    matvec, matvec_backward = _matvec(weights, seconds)
    forward, backward = zip(*single, strict=True)
    grouped_forward, grouped_backward = zip(*grouped, strict=True)
    rates = (*forward, *backward, *grouped_forward, *grouped_backward)
    peak = max(_large_gemm("cpu", dtype, 2 * WIDTH, seconds), *rates)
    return _Sweep(peak, forward, backward, grouped_forward, grouped_backward, matvec, matvec_backward)


def _single(weights: Tensor, rows: int, seconds: float) -> tuple[float, float]:
    """FLOP/s of single products of ``rows`` rows, forward and backward."""
    weight, gradient = itertools.cycle(weights.unbind()), itertools.cycle(torch.empty_like(weights).unbind())
    x_RD, dy_RN, out = (torch.rand(rows, WIDTH).to(weights.dtype) for _ in range(3))
    flops = 2 * rows * WIDTH * WIDTH
    forward = _median(lambda: torch.mm(x_RD, next(weight).t(), out=out), seconds)
    dx = _median(lambda: torch.mm(dy_RN, next(weight), out=out), seconds)
    dw = _median(lambda: torch.mm(dy_RN.t(), x_RD, out=next(gradient)), seconds)
    return flops / forward, 2 * flops / (dx + dw)


def _grouped(weights: Tensor, rows: int, seconds: float) -> tuple[float, float]:
    """FLOP/s of the grouped GEMM with ``rows`` rows an expert, forward and backward."""
    weights = weights[: max(2, SWEEP_ROWS // rows)]
    E = weights.shape[0]
    offsets_E = torch.arange(1, E + 1, dtype=torch.int32) * rows
    x_RD, dy_RN = (torch.rand(E * rows, WIDTH).to(weights.dtype) for _ in range(2))
    flops = 2 * x_RD.numel() * WIDTH
    outer = torch.ops.moepass.grouped_outer
    forward = _median(lambda: grouped_linear(x_RD, weights, None, offsets_E), seconds)
    dx = _median(lambda: grouped_linear(dy_RN, weights.transpose(1, 2), None, offsets_E), seconds)
    dw = _median(lambda: outer(dy_RN, x_RD, offsets_E, False, False), seconds)
    return flops / forward, 2 * flops / (dx + dw)


def _matvec(weights: Tensor, seconds: float) -> tuple[float, float]:
    """Bytes/s of weights in mat-vecs of one row an expert; backward: dX reads them, dW reads and writes as many."""
    E, size = weights.shape[0], weights.nbytes
    x_RD, expert_R = torch.rand(E, WIDTH).to(weights.dtype), torch.arange(E)
    outer = torch.ops.moepass.rows_outer
    forward = _median(lambda: rows_linear(x_RD, weights, None, expert_R), seconds)
    dx = _median(lambda: rows_linear(x_RD, weights.transpose(1, 2), None, expert_R), seconds)
    dw = _median(lambda: outer(x_RD, x_RD, expert_R, E), seconds)
    return size / forward, 3 * size / (dx + dw)


def _large_gemm(device: str, dtype: str, width: int, seconds: float) -> float:
    a, b = (torch.rand(width, width, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * width**3 / _median(lambda: torch.mm(a, b.t()), seconds, device)


def _copy_bandwidth(device: str, size: int, seconds: float) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), seconds, device)


def _first_writes(size: int, seconds: float) -> float:
    """Bytes/s of filling newly allocated memory."""
    return size / _median(lambda: torch.zeros(size // 4).fill_(1), seconds)


def _sort_row(device: str, seconds: float) -> float:
    """Seconds for each further routed row of sorting rows by expert: what is fixed is part of a lowering's dispatch."""
    times = []
    for R in SORTED:
        index_TK = torch.randint(64, (R // 8, 8), device=device)
        times.append(_median(functools.partial(_sorted, index_TK, 64), seconds, device))
    return max(0.0, (times[1] - times[0]) / (SORTED[1] - SORTED[0]))


def _sorted(index_TK: Tensor, E: int) -> list[Tensor]:
    return list(sort_by_expert(index_TK, E))


def _gather_bandwidth(device: str, size: int, seconds: float) -> float:
    """Bytes/s, read and written, of moving rows of 4 KiB in random order."""
    source_RD = torch.ones(max(2, size // 4096), 1024, device=device)
    order_R, target_RD = torch.randperm(source_RD.shape[0], device=device), torch.empty_like(source_RD)
    step = functools.partial(torch.index_select, source_RD, 0, order_R, out=target_RD)
    return 2 * source_RD.nbytes / _median(step, seconds, device)


def _tiles(
    device: str, tiles: tuple[tuple[float, float], ...], peak: float, seconds: float, width: int = 2048, E: int = 32
) -> tuple[tuple[float, float], ...]:
    """Rows an expert -> the part of ``peak`` (FLOP/s) that a bfloat16 grouped GEMM attains."""
    weight_EDN = torch.rand(E, width, width, device=device).to(torch.bfloat16)
    measured = []
    for rows, _ in tiles:
        x_RD = torch.rand(E * int(rows), width, device=device).to(torch.bfloat16)
        ends_E = torch.arange(1, E + 1, device=device, dtype=torch.int32) * int(rows)
        step = functools.partial(torch.nn.functional.grouped_mm, x_RD, weight_EDN, offs=ends_E)
        rate = 2 * x_RD.numel() * width / _median(step, seconds, device)
        measured.append((rows, min(1.0, rate / peak)))
    return tuple(measured)


def _launch(device: str, seconds: float) -> float:
    """Seconds per kernel (asynchronous launches that follow one another) or per aten op."""
    x, many = torch.ones(16, device=device), 50
    return _median(lambda: [x.add_(0) for _ in range(many)], seconds, device) / many


def _dispatch(name: str, seconds: float) -> tuple[float, float]:
    """Seconds of a lowering's forward pass on tiny shapes: ``(fixed, per active expert or routed row)``."""
    few, many = 1, 8
    times = []
    for K in (few, many):
        factor = 1.0 if name == "capacity" else None
        work = Workload(tokens=1, D=8, F=8, E=many, K=K, n=2, capacity_factor=factor)
        times.append(_median(functools.partial(lowerings()[name].build, *operands(work)), seconds))
    slope = max(0.0, (times[1] - times[0]) / (many - few))
    return max(0.0, times[0] - slope * few), slope


def _median(step: Callable[[], Tensor | list[Tensor]], seconds: float, device: str = "cpu") -> float:
    """Median seconds of ``step`` over a time budget, at least three runs after one to warm up."""
    samples: list[float] = []
    _timed(step, device)
    stop = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < stop:
        samples.append(_timed(step, device))
    return statistics.median(samples)


def _timed(step: Callable[[], Tensor | list[Tensor]], device: str) -> float:
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
