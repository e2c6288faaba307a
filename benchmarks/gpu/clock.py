"""Timing on an accelerator (for tests: on a CPU): medians of bursts, sides in turns, also as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.common import Timing

#: Calls are timed in bursts of about so many seconds: launches overlap as they do in a model.
BURST = 5e-3
_MOST = 50


def burst_seconds(call: Callable[[], object], times: int, device: str) -> float:
    """Seconds a call, over ``times`` calls back to back."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times
    begin, end = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


def in_turns(sides: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, Timing]:
    """Seconds a call of every side; the sides take turns, in reversed order every other time."""
    times = {}
    for name, call in sides.items():
        burst_seconds(call, 2, device)  # the first calls compile and allocate
        times[name] = max(1, min(_MOST, round(BURST / burst_seconds(call, 1, device))))
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            samples[name].append(burst_seconds(sides[name], times[name], device))
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def captured(call: Callable[[], object], device: str) -> Callable[[], object] | None:
    """The call as a replayed CUDA graph, or None where it cannot be captured (a host synchronisation, say)."""
    if device != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine attains: FLOP/s of a large GEMM, bytes/s of a large copy, seconds of a kernel in a graph."""
    large = device != "cpu"
    n = 8192 if large else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.empty((1 << 31) if large else (1 << 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    tiny = torch.zeros(1, device=device)

    def hundred() -> None:
        for _ in range(100):
            tiny.add_(1)

    calls: dict[str, Callable[[], object]] = {"gemm": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    calls["launch"] = captured(hundred, device) or hundred
    found = {name: t.median for name, t in in_turns(calls, 5, device).items()}
    return {
        "flops": 2.0 * n**3 / found["gemm"],
        "bandwidth": 2.0 * source.numel() / found["copy"],
        "launch": found["launch"] / 100,
    }


def kept_bytes(forward: Callable[[], torch.Tensor], device: str) -> int | None:
    """Bytes that a forward pass leaves allocated besides its output; None where the device does not count them."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = forward()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes())
