"""Forms of expert parallelism timed over gloo processes of this machine, beside what the cost model says of them.

Every rank measures its own arithmetic while the others do, and all measure their links together: so the prediction
knows how ranks share the cores.  A time is that of the slowest rank.

    python -m benchmarks.ep.measured STORE RESULT RANK RANKS REPEATS       # one rank; started by ``run``
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ep.processes import join, launch, slowest
from moepass import ops
from moepass.lowering.calibrate import calibrate
from moepass.lowering.calibrate_links import measured_here
from moepass.lowering.ep_cost import price
from moepass.lowering.ep_plan import on_mesh
from moepass.lowering.hardware import Hardware
from moepass.lowering.links import PRESETS
from moepass.lowering.measure import operands
from moepass.lowering.mesh import MeshDim, MeshSpec
from moepass.lowering.plan import Workload

#: Tokens of a rank, and D, F, E, K of the block: float32, gated.
TOKENS = (16, 256)
SHAPE = {"D": 256, "F": 512, "E": 8, "K": 2, "n": 2}
FORMS = ("replicated", "all_gather", "all_to_all", "ragged")


def run(ranks: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each form, T and mode over so many processes."""
    return launch("benchmarks.ep.measured", ranks, repeats)


def rank_main(store: str, result: str, rank: int, ranks: int, repeats: int) -> None:
    """What each process does; the first writes the rows."""
    join(store, rank, ranks)
    hw = calibrate(save=False, seconds=0.01, sweep_bytes=32 << 20)
    link = measured_here(seconds=0.1) if ranks > 1 else PRESETS["gloo"]
    mesh = MeshSpec(dims=(MeshDim(name="ep", size=ranks, link=link),), ep=("ep",))
    rows = []
    for tokens in TOKENS:
        for train in (False, True):
            for form in FORMS if ranks > 1 else ("local",):
                work = Workload(tokens=tokens, train=train, **SHAPE)
                seconds = _seconds(_step(form, work, rank, ranks), repeats)
                rows.append(_row(form, work, mesh, hw, seconds))
    if rank == 0:
        Path(result).write_text(json.dumps(rows))
    dist.destroy_process_group()


def _row(form: str, work: Workload, mesh: MeshSpec, hw: Hardware, seconds: float) -> dict[str, Any]:
    same = form == "replicated"
    predicted = price(form, on_mesh(work, mesh, same_tokens=same, buffer_factor=_factor(form)), hw)
    assert predicted is not None, "every form of FORMS has a cost on one dimension"
    return {
        "P": mesh.P,
        "form": form,
        "T of a rank": work.tokens,
        "mode": "forward and backward" if work.train else "forward",
        "measured [ms]": seconds * 1e3,
        "predicted [ms]": predicted.total * 1e3,
        "measured over predicted": seconds / predicted.total,
        "predicted links [ms]": predicted.communication * 1e3,
    }


def _factor(form: str) -> float | None:
    return 2.0 if form == "ragged" else None


def _step(form: str, work: Workload, rank: int, ranks: int) -> Callable[[], object]:
    """One pass over the block: own tokens, or the same ones for ``replicated``; own experts, E/P of them."""
    own = work.model_copy(update={"E": work.E // ranks})
    x_TD, index_TK, weight_TK, _ = operands(work, seed=0 if form == "replicated" else rank)
    args = operands(own, seed=100 + rank)[3]
    weights = (args.w_in, args.w_out)
    wanted = (x_TD, weight_TK, *weights)
    if form == "local":
        call = functools.partial(ops.experts, x_TD, index_TK, weight_TK, *weights, activation=args.activation)
        return functools.partial(_pass, call, wanted, work.train)
    group = dist.group.WORLD
    assert group is not None, "init_process_group was called"
    told: dict[str, Any] = {"form": "all_to_all" if form == "ragged" else form, "buffer_factor": _factor(form)}

    def apply() -> Tensor:
        return ops.experts_ep(
            x_TD,
            index_TK,
            weight_TK,
            *weights,
            activation=args.activation,
            groups=[group.group_name],
            tokens=-1,
            **told,
        )[0]

    return functools.partial(_pass, apply, wanted, work.train)


def _pass(forward: Callable[[], Tensor], wanted: Sequence[Tensor], train: bool) -> object:
    if not train:
        with torch.no_grad():
            return forward()
    y_TD = forward()
    return torch.autograd.grad(y_TD, wanted, torch.ones_like(y_TD))


def _seconds(step: Callable[[], object], repeats: int) -> float:
    """Median over repeats of the slowest rank, after two to warm up."""
    samples = []
    for turn in range(repeats + 2):
        dist.barrier()
        start = time.perf_counter()
        step()
        (seconds,) = slowest([time.perf_counter() - start])
        if turn >= 2:
            samples.append(seconds)
    return statistics.median(samples)


if __name__ == "__main__":
    rank_main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
