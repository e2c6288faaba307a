"""Time lowerings on the real device: random operands of the workload's shapes, interleaved repeats, medians.

Results are kept in the cache directory, keyed by machine, versions and workload; a damaged or read-only cache only
means that the measurement runs again.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moepass.lowering import cache, machine
from moepass.lowering.base import ExpertArgs, Lowering
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import Workload

log = logging.getLogger(__name__)

#: Stands for every activation of the same arity: the program's own cost is the same in all lowerings.
ACTIVATIONS = {1: "gelu", 2: "swiglu"}


class Timings(dict[str, float]):
    """Median seconds by lowering; ``dropped`` holds what could not run, with the reason."""

    def __init__(self, seconds: Mapping[str, float], dropped: Mapping[str, str] | None = None) -> None:
        super().__init__(seconds)
        self.dropped: dict[str, str] = dict(dropped or {})


def measure(
    work: Workload,
    candidates: Mapping[str, Lowering],
    *,
    repeats: int = 7,
    use_cache: bool = True,
) -> Timings:
    """Median seconds of each legal candidate: forward, or forward and backward if ``work.train``.

    Candidates take turns, so that drift of the machine hits all alike.  One that raises (out of memory, an unsupported
    dtype) is dropped with its reason.  Random routing is uniform.
    """
    legal = {name: lowering for name, lowering in candidates.items() if lowering.legal(work).legal}
    key = _key(work, sorted(legal), repeats)
    name = f"measure-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"
    if use_cache and (known := _load(name, key)) is not None:
        return known
    timings = _time_all(work, legal, repeats)
    if use_cache:
        cache.write(name, {"key": key, "seconds": dict(timings), "dropped": timings.dropped})
    return timings


def shortlist(
    work: Workload, hw: Hardware, candidates: Mapping[str, Lowering], *, within: float = 5.0
) -> dict[str, Lowering]:
    """The legal candidates predicted within a factor of the cheapest: what is worth timing (and fits in memory)."""
    predicted = {name: c.price(work, hw).total for name, c in candidates.items() if c.legal(work).legal}
    limit = within * min(predicted.values(), default=0.0)
    return {name: candidates[name] for name, seconds in predicted.items() if seconds <= limit}


def operands(work: Workload, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, ExpertArgs]:
    """Random ``x_TD``, ``index_TK``, ``weight_TK`` and expert operands; they require gradients if ``work.train``."""
    generator = torch.Generator(work.device).manual_seed(seed)
    dtype = getattr(torch, work.dtype)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=work.device).uniform_(-scale, scale, generator=generator)
        return values.requires_grad_(work.train)

    scores_TE = torch.rand(work.tokens, work.E, device=work.device, generator=generator)
    weight_TK, index_TK = scores_TE.topk(work.K, dim=-1)
    args = ExpertArgs(
        w_in=random(work.E, work.n * work.F, work.D, scale=work.D**-0.5),
        w_out=random(work.E, work.D, work.F, scale=work.F**-0.5),
        b_in=random(work.E, work.n * work.F) if work.bias else None,
        b_out=random(work.E, work.D) if work.bias else None,
        activation=ACTIVATIONS[work.n],
        capacity_factor=work.capacity_factor or 0.0,
    )
    return random(work.tokens, work.D), index_TK, weight_TK.requires_grad_(work.train), args


def _time_all(work: Workload, candidates: Mapping[str, Lowering], repeats: int) -> Timings:
    tensors = operands(work)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    dropped: dict[str, str] = {}
    for turn in range(repeats + 1):  # the first turn warms up
        for name in [name for name in candidates if name not in dropped]:
            try:
                seconds = _seconds(functools.partial(_step, candidates[name], tensors, work.train), work.device)
            except Exception as error:  # whatever a kernel or an allocator raises, this candidate cannot run
                dropped[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
                log.warning("%s could not run and is left out: %s", name, dropped[name])
                gc.collect()
                continue
            if turn > 0:
                samples[name].append(seconds)
    return Timings({name: statistics.median(s) for name, s in samples.items() if s and name not in dropped}, dropped)


def _step(lowering: Lowering, tensors: tuple[Tensor, Tensor, Tensor, ExpertArgs], train: bool) -> None:
    x_TD, index_TK, weight_TK, args = tensors
    if not train:
        with torch.no_grad():
            lowering.build(x_TD, index_TK, weight_TK, args)
        return
    y_TD = lowering.build(x_TD, index_TK, weight_TK, args)
    wanted = [t for t in (x_TD, weight_TK, args.w_in, args.w_out, args.b_in, args.b_out) if t is not None]
    torch.autograd.grad(y_TD, wanted, torch.ones_like(y_TD))


def _seconds(step: Callable[[], None], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _key(work: Workload, names: list[str], repeats: int) -> dict[str, Any]:
    return {
        "machine": machine.describe(work.device),
        "workload": work.model_dump(mode="json"),
        "lowerings": names,
        "repeats": repeats,
    }


def _load(name: str, key: dict[str, Any]) -> Timings | None:
    content = cache.read(name)
    if content is None:
        return None
    seconds: Any = content.get("seconds")
    dropped: Any = content.get("dropped")
    ours = content.get("key") == key and isinstance(seconds, dict) and isinstance(dropped, dict)
    if ours and all(isinstance(s, float) and s > 0 for s in seconds.values()):
        return Timings(seconds, dropped)
    log.warning("ignoring the cached measurement %s: it is damaged or belongs to another workload", name)
    return None
