"""Expert parallelism over P real processes (gloo): every form against ``reference.experts`` on the tokens of all ranks.

``check_ranks`` starts ``python -m moepass.verify.ranks`` once for each rank; a rank compares what it computed, outputs
and all gradients, with its share of the reference in float64, and leaves its errors as JSON.
Ranks have different numbers of tokens; some pairs are of nobody.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moepass.ops
from moepass import reference
from moepass.lowering.forms import HIERARCHICAL
from moepass.lowering.plan import Workload
from moepass.spec import DispatchSpec, ExpertSpec, MoESpec
from moepass.verify.compare import TOLERANCES, worst_gradient, worst_output
from moepass.verify.report import Check

#: Form and ``buffer_factor``; the factor leaves room for all rows.
FORMS: tuple[tuple[str, float | None], ...] = (
    ("replicated", None), ("all_gather", None), ("all_to_all", None), ("all_to_all", 64.0), (HIERARCHICAL, None),
)  # fmt: skip
#: Seconds after which ranks that wait for each other are a failure.
PATIENCE = 120


def check_ranks(subject: str, work: Workload, activation: str, ranks: int) -> Iterator[Check]:
    """Checks of every form for the kind of block that ``work`` describes; E must divide by ``ranks``."""
    if work.E % ranks:
        yield Check.skipped(f"{ranks} ranks: {subject}", "all", f"E={work.E} is not divisible by {ranks}")
        return
    if work.capacity_factor is not None:
        detail = "capacity over the batch counts rows in the order of the ranks, which two steps do not keep"
        yield Check.skipped(f"{ranks} ranks: {subject}", HIERARCHICAL, detail)
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "moepass.verify.ranks", folder, str(ranks), activation, work.model_dump_json()]
        started = [_start([*line, str(rank)], Path(folder) / f"log{rank}") for rank in range(ranks)]
        try:
            _wait(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
        yield from checks_of(f"{ranks} ranks: {subject}", Path(folder), ranks)


def _start(line: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    with log.open("wb") as file:
        return subprocess.Popen(line, stdout=file, stderr=file, env=environment)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all are done, one has failed (the others then get seconds to say what they see), or patience ends."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and any(p.poll() is None for p in started):
        if any(p.poll() for p in started):
            deadline = min(deadline, time.monotonic() + 3)
        time.sleep(0.05)


def checks_of(subject: str, folder: Path, ranks: int) -> Iterator[Check]:
    """The largest error over the ranks of each comparison; a rank that left none failed."""
    found = []
    for rank in range(ranks):
        file = folder / f"errors{rank}.json"
        if not file.exists():
            log = folder / f"log{rank}"
            said = (log.read_text().strip().splitlines() if log.exists() else []) or ["it left no result"]
            yield Check.holds(subject, "every rank ends", False, f"rank {rank}: {said[-1]}"[:300])
            return
        found.append(json.loads(file.read_text()))
    for name in found[0]:
        worst = max((errors[name] for errors in found), key=lambda e: e["error"])
        yield Check.within(subject, name, worst["error"], worst["tolerance"], worst["where"])


def leave_errors(
    folder: Path,
    rank: int,
    ranks: int,
    work: Workload,
    activation: str,
    forms: Sequence[tuple[str, float | None]] = FORMS,
) -> None:
    """What one rank does, inside an initialised process group of ``ranks``."""
    groups = _groups(ranks)
    found = {}
    for form, factor in forms:
        if form == HIERARCHICAL and work.capacity_factor is not None:
            continue  # ``check_ranks`` says why
        name = form if factor is None else f"{form} with a buffer"
        found.update(_errors(name, _Share(work, activation, form, factor, rank, ranks), groups[form == HIERARCHICAL]))
    path = folder / f"errors{rank}.json"
    path.with_suffix(".tmp").write_text(json.dumps(found))
    path.with_suffix(".tmp").replace(path)


def _groups(ranks: int) -> tuple[list[str], list[str]]:
    """Of all ranks in one level, and in two: nodes of as many ranks as there are nodes, or a multiple of it."""
    world = dist.group.WORLD
    assert world is not None
    nodes = max((n for n in range(2, math.isqrt(ranks) + 1) if ranks % n == 0), default=ranks)
    mesh = init_device_mesh("cpu", (nodes, ranks // nodes), mesh_dim_names=("node", "local"))
    return [world.group_name], [mesh.get_group(name).group_name for name in ("node", "local")]


class _Share:
    """The operands of all ranks, the same on each, and which of them are this rank's."""

    def __init__(self, work: Workload, activation: str, form: str, factor: float | None, rank: int, ranks: int) -> None:
        self.work, self.activation, self.form, self.factor = work, activation, form, factor
        generator = torch.Generator().manual_seed(11)
        each = [9 + 4 * r for r in range(1 if form == "replicated" else ranks)]
        T, E, K, rows = sum(each), work.E, work.K, work.n * work.F

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        index_TK = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
        self.index_TK = torch.where(torch.rand(T, K, generator=generator) < 0.2, E, index_TK)
        experts = {"w_in": draw(E, rows, work.D) * work.D**-0.5, "w_out": draw(E, work.D, work.F) * work.F**-0.5}
        if work.bias:
            experts |= {"b_in": draw(E, rows), "b_out": draw(E, work.D)}
        weight_TK = torch.rand(T, K, generator=generator, dtype=torch.float64)
        self.whole = {"x": draw(T, work.D), "routing weights": weight_TK} | experts
        start = 0 if form == "replicated" else sum(each[:rank])
        self.tokens = slice(start, T if form == "replicated" else start + each[rank])
        self.experts = slice(rank * E // ranks, (rank + 1) * E // ranks)
        self.upstream = draw(T, work.D)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of an operand, or of its gradient."""
        return whole[self.experts if name[0] in "wb" else self.tokens]


def _errors(name: str, share: _Share, groups: list[str]) -> dict[str, dict[str, float | str]]:
    """Of one form: outputs and gradients, with their tolerances."""
    wanted = {n: v.clone().requires_grad_() for n, v in share.whole.items()}
    expected = _reference(share, wanted)
    theirs = dict(zip(wanted, torch.autograd.grad(expected, list(wanted.values()), share.upstream), strict=True))
    mine = {n: share.part(n, v).clone().requires_grad_() for n, v in share.whole.items()}
    work = share.work
    y, dropped = moepass.ops.experts_ep(
        mine["x"], share.index_TK[share.tokens], mine["routing weights"], mine["w_in"], mine["w_out"],
        mine.get("b_in"), mine.get("b_out"), activation=share.activation, groups=groups, form=share.form,
        capacity_factor=work.capacity_factor, buffer_factor=share.factor, mean=False,
    )  # fmt: skip
    ours = dict(zip(mine, torch.autograd.grad(y, list(mine.values()), share.upstream[share.tokens]), strict=True))
    output = worst_output([y.detach()], [expected.detach()[share.tokens]])
    gradient = worst_gradient(ours, {n: share.part(n, g) for n, g in theirs.items()})
    tolerance = TOLERANCES[torch.float64]
    lost = int(dropped)
    return {
        f"{name}: output": {"error": output.error, "tolerance": tolerance.outputs, "where": output.where},
        f"{name}: gradients": {"error": gradient.error, "tolerance": tolerance.gradients, "where": gradient.where},
        f"{name}: nothing lost": {"error": float(lost), "tolerance": 0.0, "where": f"{lost} pairs found no room"},
    }


def _reference(share: _Share, whole: dict[str, Tensor]) -> Tensor:
    spec = MoESpec(
        experts=ExpertSpec(num_experts=share.work.E, intermediate_size=share.work.F, activation=share.activation),
        dispatch=DispatchSpec(capacity_factor=share.work.capacity_factor),
    )
    weights = reference.ExpertWeights(whole["w_in"], whole["w_out"], whole.get("b_in"), whole.get("b_out"))
    routing = reference.Routing(share.index_TK, whole["routing weights"])
    return reference.experts(whole["x"], routing, weights, spec)


def main(arguments: Sequence[str]) -> None:
    """One rank's process: ``FOLDER P ACTIVATION WORKLOAD RANK``."""
    folder, ranks, activation, work, rank = arguments
    store = dist.FileStore(f"{folder}/store", int(ranks))  # type: ignore[attr-defined]
    patience = timedelta(seconds=PATIENCE / 2)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(ranks), timeout=patience)
    leave_errors(Path(folder), int(rank), int(ranks), Workload.model_validate_json(work), activation)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
