"""Run as a script: ``moepass calibrate`` in three processes at once, one of which is killed in the middle.

    python calibrate_at_once.py FOLDER

The three are forks (importing torch once) that wait for each other before the last figures.  FOLDER/0 and FOLDER/1 then
hold what the two that were left alive printed; the profile is where ``$MOEPASS_CACHE_DIR`` says.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from moepass.cli import app
from moepass.lowering import calibrate

LAST = "memory bandwidth, sorting, dispatch"


def run(output: Path, at_last: Callable[[], None]) -> None:
    """The command in this process, on little data."""
    real = calibrate.calibrate

    def quick(device: str, progress: Callable[[str], None]) -> object:
        def say(step: str) -> None:
            progress(step)
            if step == LAST:
                at_last()

        return real(device, progress=say, seconds=0.0, sweep_bytes=2 << 20)

    calibrate.calibrate = quick  # type: ignore[assignment]
    calibrate.DTYPES = ("float32",)
    with output.open("w") as file, redirect_stdout(file):
        app(["calibrate"], standalone_mode=False)


def started(output: Path, reached: int, go: int) -> int:
    """A process that runs the command, says so before the last figures, and waits there until it is told to go on."""

    def at_last() -> None:
        os.write(reached, b".")
        os.read(go, 1)

    if pid := os.fork():
        return pid
    signal.alarm(100)  # rather than for ever, should another one fail
    run(output, at_last)
    os._exit(0)


def main(folder: Path) -> None:
    signal.alarm(100)
    reached, reached_w = os.pipe()
    go_r, go = os.pipe()
    *alive, killed = (started(folder / str(i), reached_w, go_r) for i in range(3))
    for _ in range(3):
        os.read(reached, 1)
    os.kill(killed, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(killed, 0)[1]) == signal.SIGKILL
    os.write(go, b"..")  # now that it cannot take one of them
    assert [os.waitpid(pid, 0)[1] for pid in alive] == [0, 0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
