"""Kernels that have never run on a machine are held to the reference there, once, before a plan may choose them.

Contract
    in    an accelerator's device type
    out   None where the fused kernels agree with ``moepass.reference`` in float64, outputs and all gradients; else what
          went wrong, in words: a kernel that does not compile, or numbers that differ
    Success is kept in the cache directory, for this machine, these versions and these kernel sources; a failure is
    looked at again in the next process.  The first time takes as long as compiling some twenty kernels.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moepass import errors, reference
from moepass.kernels.fused.ops import fused_experts
from moepass.kernels.fused.schedule_decode import MOST_TOKENS
from moepass.lowering import cache, machine

log = logging.getLogger(__name__)

#: Largest error over the largest value: roundings of operands, hidden values and results.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class Case(NamedTuple):
    """One block: SwiGLU with biases; its last pair has no expert."""

    dtype: str
    T: int
    D: int
    F: int
    E: int
    K: int


#: Narrow tiles, masked on every side; and the widest ones, with whole and with part tiles of rows.
CASES = (Case("float32", 37, 72, 40, 5, 2), Case("bfloat16", 300, 256, 128, 2, 1))

#: Token counts whose weights are streamed, one row and the most at once.
DECODED = (1, MOST_TOKENS)


def failure(device: str) -> str | None:
    """None where the kernels may be trusted on this machine, else why not."""
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        return "they have not been checked on this machine yet: run the block once before capturing it"
    return _checked(device)


@functools.cache
def _checked(device: str) -> str | None:
    name = f"self-check-{device}-{machine.fingerprint(device)}.json"
    passed = {"sources": _sources(), "cases": [list(case) for case in CASES]}
    if cache.read(name) == passed:
        return None
    log.info("checking the fused kernels on this machine, once")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        found = next(_wrong(device), None)
    if found is None:
        cache.write(name, passed)
    else:
        log.warning("the fused kernels are left out of plans on this machine: %s", found)
    return found


def _wrong(device: str) -> Iterator[str]:
    for case in CASES:
        try:
            for name, off in _errors(case, device):
                if off is not None:
                    yield f"{name} is off by {off:.1e} ({case})"
        except Exception as error:  # whatever a compiler or a driver raises: not here
            yield f"{type(error).__name__}: {errors.first_line(error)}"


def _errors(case: Case, device: str) -> Iterator[tuple[str, float | None]]:
    """By result: its error where that is too large, else None."""
    wide = _leaves(case)
    index_TK = _index(case)
    dtype = getattr(torch, case.dtype)
    ours = {
        name: t.detach().to(device, torch.float32 if name == "weight" else dtype).requires_grad_()
        for name, t in wide.items()
    }
    operands = (ours["x"], index_TK.to(device), *(ours[n] for n in ("weight", "w_in", "w_out", "b_in", "b_out")))
    y_TD = fused_experts(*operands, activation="silu(g)*u")
    with torch.no_grad():
        few = {T: fused_experts(*_first(operands, T), activation="silu(g)*u", save=False) for T in DECODED}
    weights = reference.ExpertWeights(*(wide[n] for n in ("w_in", "w_out", "b_in", "b_out")))
    truth_TD = reference.routed_experts(wide["x"], index_TK, wide["weight"], weights, "swiglu")
    dy_TD = torch.linspace(-1, 1, truth_TD.numel(), dtype=torch.float64).view_as(truth_TD).to(dtype)
    found = torch.autograd.grad(y_TD, list(ours.values()), dy_TD.to(device))
    truth = torch.autograd.grad(truth_TD, list(wide.values()), dy_TD.double())
    yield "y", _error(y_TD, truth_TD, case.dtype)
    for T, found_TD in few.items():
        yield f"y of {T} tokens alone", _error(found_TD, truth_TD[:T], case.dtype)
    for name, g, t in zip(ours, found, truth, strict=True):
        yield f"the gradient of {name}", _error(g, t, case.dtype)


def _first(operands: tuple[Tensor, ...], T: int) -> tuple[Tensor, ...]:
    """The operands of the first tokens alone."""
    return (*(t[:T] for t in operands[:3]), *operands[3:])


def _leaves(case: Case) -> dict[str, Tensor]:
    """float64 leaves with values that the case's dtype holds exactly."""
    draw, rows = torch.Generator().manual_seed(0), 2 * case.F

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*shape, generator=draw, dtype=torch.float64)
        return values.to(getattr(torch, case.dtype)).double().requires_grad_()

    return {
        "x": random(case.T, case.D),
        "weight": torch.rand(case.T, case.K, generator=draw).double().requires_grad_(),
        "w_in": random(case.E, rows, case.D, scale=case.D**-0.5),
        "w_out": random(case.E, case.D, case.F, scale=case.F**-0.5),
        "b_in": random(case.E, rows),
        "b_out": random(case.E, case.D),
    }


def _index(case: Case) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    index_TK = torch.rand(case.T, case.E, generator=draw).argsort(1)[:, : case.K].contiguous()
    index_TK[-1, -1] = case.E
    return index_TK


def _error(found: Tensor, truth: Tensor, dtype: str) -> float | None:
    truth = truth.detach()
    off = float((found.detach().cpu().double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30))
    return None if off <= TOLERANCE[dtype] else off  # NaN is not


def _sources() -> str:
    digest = hashlib.sha256()
    root = Path(str(resources.files("moepass.kernels")))
    for file in sorted([*(root / "fused").glob("*.py"), *(root / "codegen").glob("*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
