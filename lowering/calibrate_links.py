"""Measure the collectives between ranks of this machine, or of a ``torchrun`` job: ``moepass calibrate --dist``.

For each collective and a few sizes the time of one call, of the slowest rank; then alpha and beta by least squares of
the relative error.  What is timed are the functional ops that the forms use (``moepass.lowering.ep``).

    python -m moepass.lowering.calibrate_links STORE RESULT RANK RANKS DEVICE SECONDS   # one rank; started by us
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moepass import _compat, errors
from moepass.lowering import links
from moepass.lowering.links import COLLECTIVES, Collective, Fit, Link

#: Bytes that a rank sends in one call.
SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 23)
#: Calls of each collective and size, at least and at most.
FEWEST, MOST = 5, 200
#: Seconds until ranks that were started here are given up.
PATIENCE = 300.0

Times = dict[str, list[tuple[float, float]]]


def calibrate_links(ranks: int, device: str = "cpu", *, seconds: float = 0.1, save: bool = True) -> Link:
    """The links among ``ranks`` ranks: those of a ``torchrun`` job that this process is part of, else of new processes.

    ``seconds``  spent on each of the 20 figures
    ``save``     keep it where meshes find it (the first rank of a job does), until versions or the machine change
    Raises ``BadOption`` for a number of ranks that cannot be.
    """
    if torch.distributed.is_torchelastic_launched():
        times, first = _in_job(ranks, device, seconds)
    else:
        if not 2 <= ranks <= links.MOST_CALIBRATED:
            raise _bad(ranks, f"give 2 to {links.MOST_CALIBRATED} ranks")
        times, first = _in_processes(ranks, device, seconds), True
    found = _link(times, ranks, device)
    if save and first:
        links.save(found, device, ranks)
    return found


def measured_here(device: str = "cpu", *, seconds: float = 0.1) -> Link:
    """The links among the ranks of the present default group; every rank calls it and gets the same."""
    return _link(_measure(device, seconds), dist.get_world_size(), device)


def fit(points: Sequence[tuple[float, float]], ranks: int) -> tuple[float, float, float]:
    """``(latency a step, bandwidth, median relative error)`` of ``(bytes sent, seconds)`` points.

    Minimises the squares of ``(alpha + sent/bandwidth) / seconds - 1``; neither part is negative.
    """
    a = [1.0 / t for _, t in points]
    b = [sent / t for sent, t in points]
    aa, ab, bb = sum(x * x for x in a), sum(x * y for x, y in zip(a, b, strict=True)), sum(y * y for y in b)
    determinant = aa * bb - ab * ab
    alpha = (bb * sum(a) - ab * sum(b)) / determinant if determinant > 0 else 0.0
    beta = (aa * sum(b) - ab * sum(a)) / determinant if determinant > 0 else 0.0
    if alpha <= 0.0:
        alpha, beta = 0.0, sum(b) / bb
    elif beta <= 0.0:
        alpha, beta = sum(a) / aa, 1e-15
    error = statistics.median(abs((alpha + beta * sent) / t - 1.0) for sent, t in points)
    return alpha / links.steps(ranks), 1.0 / beta, error


def _link(times: Times, ranks: int, device: str) -> Link:
    fits = []
    for name in COLLECTIVES:
        latency, bandwidth, error = fit(times[name], ranks)
        fits.append(Fit(collective=name, latency=latency, bandwidth=bandwidth, error=error))
    exchange = fits[0]
    return Link(
        name=f"{_backend(device)}-{ranks}",
        bandwidth=exchange.bandwidth,
        latency=exchange.latency,
        fits=tuple(fits),
        source="calibrated",
        comment=f"measured by moepass calibrate --dist among {ranks} ranks, {_backend(device)}",
    )


def _in_job(ranks: int, device: str, seconds: float) -> tuple[Times, bool]:
    """Measure in the group of a ``torchrun`` job; every rank gets the same times."""
    world = int(os.environ["WORLD_SIZE"])
    if ranks != world:
        raise _bad(ranks, f"this torchrun job has {world} ranks; give that number")
    if world < 2:
        raise _bad(ranks, "there is nothing between one rank and itself; start at least 2")
    own = not dist.is_initialized()
    if own and device != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    if own:
        dist.init_process_group(_backend(device))
    try:
        return _measure(device, seconds), dist.get_rank() == 0
    finally:
        if own:
            dist.destroy_process_group()


def _in_processes(ranks: int, device: str, seconds: float) -> Times:
    """Measure in as many new processes."""
    with tempfile.TemporaryDirectory() as folder:
        store, result = Path(folder, "store"), Path(folder, "times.json")
        command = [sys.executable, "-P", "-m", "moepass.lowering.calibrate_links", str(store), str(result)]
        started = []
        try:
            for rank in range(ranks):
                arguments = [str(rank), str(ranks), device, str(seconds)]
                with Path(folder, f"{rank}.log").open("w") as log:
                    started.append(subprocess.Popen([*command, *arguments], stdout=log, stderr=log))
            _wait(started, folder)
            times: Times = {
                name: [(s, t) for s, t in points] for name, points in json.loads(result.read_text()).items()
            }
            return times
        finally:
            for process in started:
                process.kill()
                process.wait()


def _wait(started: Sequence[subprocess.Popen[bytes]], folder: str) -> None:
    """Until all have ended well; the first that fails, or takes too long, is an error with its last words."""
    stop = time.monotonic() + PATIENCE
    while any(process.poll() is None for process in started) and time.monotonic() < stop:
        if any(process.poll() for process in started):
            break
        time.sleep(0.05)
    for rank, process in enumerate(started):
        if process.poll():
            words = Path(folder, f"{rank}.log").read_text(errors="replace").strip().splitlines() or ["no word of it"]
            raise _bad(len(started), f"rank {rank} failed: {words[-1][:200]}")
    if any(process.poll() is None for process in started):
        raise _bad(len(started), f"the ranks did not finish within {PATIENCE:.0f} s")


def _measure(device: str, seconds: float) -> Times:
    """``(bytes sent, seconds)`` of every collective and size, of the slowest rank; the same on every rank."""
    return {name: [_time(name, size, device, seconds) for size in SIZES] for name in COLLECTIVES}


def _time(name: Collective, size: int, device: str, seconds: float) -> tuple[float, float]:
    call, sent = _call(name, size, device)
    once = _slowest(_seconds(call, device), device)
    repeats = max(FEWEST, min(MOST, int(seconds / max(once, 1e-9))))
    samples = []
    for _ in range(repeats):
        dist.barrier()
        samples.append(_seconds(call, device))
    return sent, _slowest(statistics.median(samples), device)


def _call(name: Collective, size: int, device: str) -> tuple[Callable[[], Tensor], float]:
    """A collective in which a rank sends about ``size`` bytes, and how many exactly; rows of 64 float32 values."""
    P, group, row = dist.get_world_size(), dist.group.WORLD.group_name, 64 * 4  # type: ignore[union-attr]
    if name == "all_to_all":
        each = max(1, round(size / (P - 1) / row))
        x, splits = torch.ones(P * each, 64, device=device), [each] * P
        return lambda: _compat.all_to_all(x, splits, splits, group), float((P - 1) * each * row)
    if name == "all_reduce":
        rows = max(1, round(size * P / (2 * (P - 1)) / row))
        x = torch.ones(rows, 64, device=device)
        return lambda: _compat.all_reduce(x, group), 2 * (P - 1) / P * rows * row
    own = max(1, round(size / (P - 1) / row))
    if name == "all_gather":
        x = torch.ones(own, 64, device=device)
        return lambda: _compat.all_gather(x, P, group), float((P - 1) * own * row)
    x = torch.ones(P * own, 64, device=device)
    return lambda: _compat.wait(_compat.begin_reduce_scatter(x, P, group)), float((P - 1) * own * row)


def _seconds(call: Callable[[], Tensor], device: str) -> float:
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _slowest(seconds: float, device: str) -> float:
    found = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found.item())


def _backend(device: str) -> str:
    return "gloo" if device == "cpu" else str(dist.get_default_backend_for_device(device))


def _bad(ranks: int, detail: str) -> errors.BadOption:
    return errors.BadOption(name="--dist", value=ranks, detail=detail)


def main(argv: Sequence[str]) -> None:
    """One rank of ``_in_processes``."""
    store, result, rank, ranks, device, seconds = argv
    if device != "cpu":
        torch.accelerator.set_device_index(int(rank))
    dist.init_process_group(_backend(device), init_method=f"file://{store}", rank=int(rank), world_size=int(ranks))
    times = _measure(device, float(seconds))
    if rank == "0":
        Path(result).write_text(json.dumps(times))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
