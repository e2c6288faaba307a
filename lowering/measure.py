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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moepass import _compat
from moepass.kernels import host
from moepass.lowering import cache, machine
from moepass.lowering import routing as spread
from moepass.lowering.base import ExpertArgs, Lowering
from moepass.lowering.facts import Fact
from moepass.lowering.hardware import Hardware
from moepass.lowering.plan import Workload

log = logging.getLogger(__name__)

#: Stands for every activation of the same arity: the program's own cost is the same in all lowerings.
ACTIVATIONS = {1: "gelu", 2: "swiglu"}


#: Runs behind each median.
REPEATS = 7

#: A block's operands: ``x_TD``, ``index_TK``, ``weight_TK`` and the expert weights.
Operands = tuple[Tensor, Tensor, Tensor, ExpertArgs]


class Timings(dict[str, float]):
    """Median seconds by lowering; ``dropped`` holds what could not run, with the reason."""

    def __init__(self, seconds: Mapping[str, float], dropped: Mapping[str, str] | None = None) -> None:
        super().__init__(seconds)
        self.dropped: dict[str, str] = dict(dropped or {})

    def facts(self, work: Workload) -> list[Fact]:
        """What later plans may learn of them; nothing where nothing ran."""
        return [Fact(work=work, seconds=tuple(self.items()), source="measure", runs=REPEATS)] if self else []


def measure(
    work: Workload,
    candidates: Mapping[str, Lowering],
    *,
    repeats: int = REPEATS,
    use_cache: bool = True,
) -> Timings:
    """Median seconds of each legal candidate: forward, or forward and backward if ``work.train``.

    Candidates take turns, so that drift of the machine hits all alike.  One that raises (out of memory, an unsupported
    dtype) is dropped with its reason.  Operands and routing are drawn (``operands``).
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


def operands(work: Workload, *, seed: int = 0) -> Operands:
    """Random ``x_TD``, ``index_TK``, ``weight_TK`` and expert operands; they require gradients if ``work.train``.

    The routing is drawn as ``work.routing`` says (``lowering.routing``).
    """
    generator = torch.Generator(work.device).manual_seed(seed)
    dtype = getattr(torch, work.dtype)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=work.device).uniform_(-scale, scale, generator=generator)
        return values.requires_grad_(work.train)

    weight_TK = torch.rand(work.tokens, work.K, device=work.device, generator=generator)
    args = ExpertArgs(
        w_in=random(work.E, work.n * work.F, work.D, scale=work.D**-0.5),
        w_out=random(work.E, work.D, work.F, scale=work.F**-0.5),
        b_in=random(work.E, work.n * work.F) if work.bias else None,
        b_out=random(work.E, work.D) if work.bias else None,
        activation=ACTIVATIONS[work.n],
        capacity_factor=work.capacity_factor or 0.0,
    )
    return random(work.tokens, work.D), _drawn(work, generator), weight_TK.requires_grad_(work.train), args


def _drawn(work: Workload, generator: torch.Generator) -> Tensor:
    """``index_TK``: K distinct experts a token; the first K of E exponential clocks, or dealt out in turn."""
    exponent = spread.skew(work.routing)
    if exponent is None:
        dealt_R = torch.arange(work.R, device=work.device) % work.E
        return dealt_R.view(work.tokens, work.K)
    rate_E = torch.arange(1, work.E + 1, device=work.device, dtype=torch.float64) ** -exponent
    clock_TE = torch.rand(work.tokens, work.E, device=work.device, dtype=torch.float64, generator=generator)
    return (-clock_TE.clamp(min=1e-300).log() / rate_E).topk(work.K, dim=-1, largest=False).indices


@dataclass(frozen=True)
class Samples:
    """What runs of one candidate took: seconds of each turn, and bytes of memory at the peak above the start.

    ``peak_bytes`` is None where it was not asked for or cannot be known; ``failed``: why it could not run.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    failed: str | None = None


def sample(
    tensors: Operands, candidates: Mapping[str, Lowering], *, train: bool, repeats: int, peaks: bool = False
) -> dict[str, Samples]:
    """Run each candidate ``repeats`` times on these operands, in turns, after one turn to warm up.

    Forward, or forward and backward if ``train`` (the operands must require gradients then).  One that raises is not
    tried again.  ``peaks``: one more run for each, to read its memory.
    """
    device = tensors[0].device.type
    found = {name: Samples() for name in candidates}
    for turn in range(repeats + 1):
        for name in [name for name in candidates if found[name].failed is None]:
            try:
                seconds = _seconds(functools.partial(_step, candidates[name], tensors, train), device)
            except Exception as error:  # whatever a kernel or an allocator raises, this candidate cannot run
                found[name] = Samples(failed=f"{type(error).__name__}: {error}".partition("\n")[0])
                log.warning("%s could not run and is left out: %s", name, found[name].failed)
                gc.collect()
                continue
            if turn > 0:
                found[name].seconds.append(seconds)
    if not peaks:
        return found
    return {name: s if s.failed else _with_peak(s, candidates[name], tensors, train) for name, s in found.items()}


def _with_peak(samples: Samples, lowering: Lowering, tensors: Operands, train: bool) -> Samples:
    step = functools.partial(_step, lowering, tensors, train)
    with host.counted():
        return Samples(samples.seconds, _compat.peak_bytes(step, tensors[0].device.type))


def _time_all(work: Workload, candidates: Mapping[str, Lowering], repeats: int) -> Timings:
    found = sample(operands(work), candidates, train=work.train, repeats=repeats)
    seconds = {name: statistics.median(s.seconds) for name, s in found.items() if s.seconds and s.failed is None}
    return Timings(seconds, {name: s.failed for name, s in found.items() if s.failed is not None})


def _step(lowering: Lowering, tensors: Operands, train: bool) -> None:
    x_TD, index_TK, weight_TK, args = tensors
    if not train:
        with torch.no_grad():
            lowering.build(x_TD, index_TK, weight_TK, args)
        return
    with torch.enable_grad():
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
