"""A training step over gloo ranks, compiled by moepass and Inductor beside the same step run eagerly.

Two layers of a dense mix and an MoE block, float32, every rank with its own tokens.  Both sides start from the same
parameters and see the same tokens; they take turns, and a time is that of the slowest rank.  The optimizer, the mean of
gradients over ranks and clipping are eager on both sides and counted in the step.

    python -m benchmarks.ep.steps STORE RESULT RANK RANKS REPEATS TOKENS      # one rank; started by ``run``
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import moepass
from benchmarks.common import Timing
from benchmarks.ep.measured import FORMS, SHAPE
from benchmarks.ep.processes import join, launch, slowest
from moepass.parallel import average_gradients, clip_grad_norm_
from moepass.spec import ExpertSpec, MoESpec, RouterSpec

LAYERS = 2
#: Blocks of ``ragged``, in mean rows of a rank.
FACTOR = 2.0
#: Turns that are not counted: the first of the compiled side compiles.
WARMUP = 3


def run(ranks: int, repeats: int, tokens: int) -> list[dict[str, Any]]:
    """One row for each form over so many processes, with ``tokens`` on each."""
    return launch("benchmarks.ep.steps", ranks, repeats, tokens)


class Layer(nn.Module):
    """Something replicated before the experts, as attention is."""

    def __init__(self) -> None:
        super().__init__()
        D = SHAPE["D"]
        experts = ExpertSpec(num_experts=SHAPE["E"], intermediate_size=SHAPE["F"], activation="swiglu")
        self.mix = nn.Linear(D, D)
        self.moe = MoESpec(router=RouterSpec(top_k=SHAPE["K"]), experts=experts).build(D)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D] -> [T, D]``."""
        x = x + F.silu(self.mix(F.rms_norm(x, x.shape[-1:])))
        y: Tensor = x + self.moe(F.rms_norm(x, x.shape[-1:]))
        return y


def rank_main(store: str, result: str, rank: int, ranks: int, repeats: int, tokens: int) -> None:
    """What each process does; the first writes the rows."""
    join(store, rank, ranks)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))
    rows = [_row(form, rank, mesh, repeats, tokens) for form in FORMS]
    if rank == 0:
        Path(result).write_text(json.dumps(rows))
    dist.destroy_process_group()


def _row(form: str, rank: int, mesh: DeviceMesh, repeats: int, tokens: int) -> dict[str, Any]:
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0 if form == "replicated" else rank)
    x_TD, target_TD = torch.randn(2, tokens, SHAPE["D"], generator=generator)
    sides = {name: _step(_model(form, mesh), mesh, name, x_TD, target_TD) for name in ("eager", "compiled")}
    passes, steps, losses = _timed(sides, repeats)
    return {
        "P": mesh.size(),
        "form": form,
        "T of a rank": tokens,
        "eager step [ms]": steps["eager"].median * 1e3,
        "compiled step [ms]": steps["compiled"].median * 1e3,
        "eager over compiled": steps["eager"].median / steps["compiled"].median,
        "eager pass [ms]": passes["eager"].median * 1e3,
        "compiled pass [ms]": passes["compiled"].median * 1e3,
        "pass: eager over compiled": passes["eager"].median / passes["compiled"].median,
        "quartiles of the steps [ms]": "; ".join(f"{t.low * 1e3:.3g}..{t.high * 1e3:.3g}" for t in steps.values()),
        "losses apart": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
    }


def _model(form: str, mesh: DeviceMesh) -> nn.Module:
    torch.manual_seed(0)
    ragged = form == "ragged"
    return moepass.parallelize(
        nn.Sequential(*(Layer() for _ in range(LAYERS))), mesh, form="all_to_all" if ragged else form,  # type: ignore[arg-type]
        buffer_factor=FACTOR if ragged else None, tokens="equal",
    )  # fmt: skip


#: Seconds of forward and backward, of the whole step, and the loss.
Step = Callable[[], tuple[float, float, float]]


def _step(model: nn.Module, mesh: DeviceMesh, side: str, x_TD: Tensor, target_TD: Tensor) -> Step:
    """One training step of a side."""
    options = {"strict": True}
    run = torch.compile(model, backend="moepass", fullgraph=True, options=options) if side == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> tuple[float, float, float]:
        start = time.perf_counter()
        loss = F.mse_loss(run(x_TD), target_TD)
        loss.backward()
        passed = time.perf_counter()
        average_gradients(model, mesh)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return passed - start, time.perf_counter() - start, loss.item()

    return step


def _timed(sides: dict[str, Step], repeats: int) -> tuple[dict[str, Timing], dict[str, Timing], dict[str, list[float]]]:
    """Passes and steps of the slowest rank, in turns, and every loss of this rank."""
    passes: dict[str, list[float]] = {name: [] for name in sides}
    steps: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(WARMUP + repeats):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            dist.barrier()
            *seconds, loss = sides[name]()
            passed, whole = slowest(seconds)
            losses[name].append(loss)
            if turn >= WARMUP:
                passes[name].append(passed)
                steps[name].append(whole)
    return _timings(passes), _timings(steps), losses


def _timings(samples: dict[str, list[float]]) -> dict[str, Timing]:
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """In a sentence: is a compiled step as fast as an eager one?"""
    ratios = {row["form"]: row["eager over compiled"] for row in rows}
    slower = [form for form, ratio in ratios.items() if ratio < 1.0]
    said = f"slower compiled than eager: {', '.join(slower)}" if slower else "no form is slower compiled than eager"
    return f"{said}; eager over compiled from {min(ratios.values()):.2f} to {max(ratios.values()):.2f}"


if __name__ == "__main__":
    rank_main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
