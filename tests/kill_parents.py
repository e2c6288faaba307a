"""Run as a script: kill -9 an upcycling from several parents at every fourth step of the writer, and resume.

    python kill_parents.py SRC WORK OPTIONS...

Each run is a fork (importing torch once).  Prints JSON: how many kills, and which outputs then differ from WORK/whole.
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


def forked(arguments: list[str], kill_at: int) -> bool:
    """Run the command in a fork that dies at its n-th step; whether it lived."""
    pid = os.fork()
    if pid == 0:
        left, real = [kill_at], writer._Run.step

        def step(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        writer._Run.step = step
        app = typer.Typer()
        app.command()(cli_upcycle.upcycle)
        os._exit(app(arguments, standalone_mode=False) or 0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"{arguments} {kill_at}"
    return os.WIFEXITED(status)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def main(src: str, work: Path, options: list[str]) -> None:
    assert forked([src, str(work / "whole"), *options], 0)
    whole, different, kills = content(work / "whole"), [], 0
    for n in range(1, 1000, 4):
        dst = work / str(n)
        if forked([src, str(dst), *options], n):
            break
        kills += 1
        assert "config.json" not in content(dst) or content(dst).keys() >= whole.keys()
        assert forked([src, str(dst), *options, "--resume"], 0)
        different += [n] if content(dst) != whole else []
    print(json.dumps({"kills": kills, "different": different}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
