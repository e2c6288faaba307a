"""Ranks for the benchmarks of expert parallelism: gloo processes of this machine, and times of the slowest of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
#: Seconds until ranks that were started are given up.
PATIENCE = 1500


def launch(module: str, ranks: int, *arguments: object) -> list[dict[str, Any]]:
    """Run ``python -m module STORE RESULT RANK RANKS ARGUMENTS`` once for each rank; the rows that the first left."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "rows.json")
        command = [sys.executable, "-P", "-m", module, f"{folder}/store", str(result)]
        told = [str(argument) for argument in arguments]
        started = [subprocess.Popen([*command, str(rank), str(ranks), *told], env=environment) for rank in range(ranks)]
        try:
            if any(process.wait(timeout=PATIENCE) for process in started):
                raise RuntimeError(f"a rank of {ranks} failed; its words are above")
        finally:
            for process in started:
                process.kill()
        rows: list[dict[str, Any]] = json.loads(result.read_text())
        return rows


def join(store: str, rank: int, ranks: int) -> None:
    """Become a rank of the group that ``launch`` started."""
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    dist.barrier()


def slowest(seconds: Sequence[float]) -> list[float]:
    """The most that any rank took, for each figure."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    values: list[float] = found.tolist()
    return values
