"""Run as a script: kill -9 an upcycling from several parents at steps of the writer, and resume.

    python kill_parents.py SRC WORK OPTIONS...

Each killed run is a fork (importing torch once).  Prints JSON: how many kills, and which outputs then differ from
WORK/whole.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import typer

from moepass import cli_upcycle
from moepass.upcycle.checkpoint import writer

KILLS = 6


def run(arguments: list[str], kill_at: int = 0) -> int:
    """Run the command in this process, which dies at its n-th step; how many steps there were."""
    count, real = [0], writer._Run.step

    def step(*args, **kwargs):
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    writer._Run.step = step
    app = typer.Typer()
    app.command()(cli_upcycle.upcycle)
    assert not app(arguments, standalone_mode=False)
    writer._Run.step = real
    return count[0]


def killed(arguments: list[str], kill_at: int) -> None:
    pid = os.fork()
    if pid == 0:
        run(arguments, kill_at)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"{arguments} survived step {kill_at}"


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def main(src: str, work: Path, options: list[str]) -> None:
    steps = run([src, str(work / "whole"), *options])
    whole, different = content(work / "whole"), []
    for n in (1 + steps * i // KILLS for i in range(KILLS)):
        dst = work / str(n)
        killed([src, str(dst), *options], n)
        assert "config.json" not in content(dst)
        run([src, str(dst), *options, "--resume"])
        different += [n] if content(dst) != whole else []
    print(json.dumps({"kills": KILLS, "different": different}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
