"""Real processes with gloo between them, for tests: a test file runs itself once for every rank.

    def rank_main(rank: Rank) -> None: ...          # in the test file: what each rank does
    if __name__ == "__main__": ranks.join(rank_main)

``spawn(__file__, 4, folder)`` starts the ranks and returns what each of them passed to ``rank.save``.  Starting a
process costs seconds (it imports torch), so that many cases share one start.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CONFTEST = Path(__file__).resolve().parent / "conftest.py"
#: Loads conftest.py, whose finder knows the suite's helpers, and then the test file as a script.
BOOT = f"""
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("conftest", {str(CONFTEST)!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@dataclass(frozen=True)
class Rank:
    """One process of a group."""

    number: int
    size: int
    folder: Path
    arguments: list[str]

    def save(self, value: Any) -> None:
        """What ``spawn`` returns for this rank."""
        torch.save(value, self.folder / f"rank{self.number}.pt")


def start(script: str, ranks: int, folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """The processes; their output is in ``folder/log<rank>``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-P", "-c", BOOT, script]
    processes = []
    for rank in range(ranks):
        with open(folder / f"log{rank}", "w") as log:
            line = [*command, str(rank), str(ranks), str(folder), *arguments]
            processes.append(subprocess.Popen(line, stdout=log, stderr=log, text=True, env=environment))
    return processes


def spawn(script: str, ranks: int, folder: Path, *arguments: str, timeout: float = 300) -> list[Any]:
    """Run ``script`` in every rank to its end; what the ranks saved, None where they saved nothing."""
    with running(start(script, ranks, folder, *arguments)) as processes:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            if any(p.poll() for p in processes):
                deadline = min(deadline, time.monotonic() + 5)  # one failed: let the others say what they see
            time.sleep(0.05)
        codes = [p.poll() for p in processes]
    logs = "\n".join(f"--- rank {r} ({codes[r]})\n{(folder / f'log{r}').read_text()[-3000:]}" for r in range(ranks))
    assert codes == [0] * ranks, logs
    files = [folder / f"rank{rank}.pt" for rank in range(ranks)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


@contextlib.contextmanager
def running(processes: list[subprocess.Popen[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Whatever happens, none of them stays."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def join(main: Callable[[Rank], None], *, timeout: float = 120) -> None:
    """In a rank's process: join the group, do ``main``, leave."""
    number, size, folder, *arguments = sys.argv[2:]
    rank = Rank(int(number), int(size), Path(folder), arguments)
    store = dist.FileStore(f"{folder}/store", rank.size)
    dist.init_process_group(
        "gloo", store=store, rank=rank.number, world_size=rank.size, timeout=timedelta(seconds=timeout)
    )
    torch.set_num_threads(1)
    main(rank)
    dist.barrier()
    dist.destroy_process_group()
