"""Run as a script: kill -9 a writing process before its n-th system call, for every n, and resume.

    python kill_everywhere.py SRC WORK WORKERS STRIDE

Each run is a fork (importing torch once), patched so that it kills itself.  Prints JSON: how many kills, and what was
wrong after each of them.  ``WORK/whole`` is the uninterrupted output.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from moepass.upcycle.checkpoint import writer
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import Computed, OutTensor, Verbatim

CALLS = ("open", "pwrite", "write", "copy_file_range", "fsync", "replace", "unlink", "ftruncate", "mkdir", "close")
FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "extra/x.txt": b"x"}


def doubled(x):
    return x * 2


def run(src: str, dst: Path, workers: int, *, resume: bool) -> None:
    source = Source.open(src)
    few = list(source.headers.items())[1:8:3]
    tensors = [OutTensor(n, h.shape, h.dtype, Verbatim(n)) for n, h in few]
    for n, h in few:
        tensors.append(OutTensor(f"{n}.2", h.shape, h.dtype, Computed((n,), doubled, "doubled"), group=n))
    writer.write(dst, tensors, source, FILES, max_shard_size=4350, workers=workers, resume=resume)


def forked(src: str, dst: Path, workers: int, kill_at: int, *, resume: bool) -> bool:
    """Run in a fork that dies before its n-th call; whether it lived."""
    pid = os.fork()
    if pid == 0:
        arm(kill_at)
        try:
            run(src, dst, workers, resume=resume)
        except BaseException as e:
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"{dst} kill_at={kill_at} resume={resume}"
    return os.WIFEXITED(status)


def arm(kill_at: int) -> None:
    left = [kill_at]
    for name in CALLS:
        original = getattr(os, name)

        def call(*args, _original=original, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return _original(*args, **kwargs)

        setattr(os, name, call)


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def wrong_after_kill(left: dict[str, str], whole: dict[str, str]) -> str:
    """A file under its final name is the final file; config.json is there only when everything else is."""
    for name, digest in left.items():
        if name in whole and digest != whole[name]:
            return f"{name} is not what it should be"
    if "config.json" in left and not set(whole) <= set(left):
        return "config.json is there before the rest"
    return ""


def main(src: str, work: Path, workers: int, stride: int) -> None:
    assert forked(src, work / "whole", workers, 0, resume=False)
    whole, problems, kills = digests(work / "whole"), [], 0
    for n in range(1, 10_000, stride):
        dst = work / str(n)
        if forked(src, dst, workers, n, resume=False):
            break
        kills += 1
        problems += [f"{n}: {text}"] if (text := wrong_after_kill(digests(dst), whole)) else []
        forked(src, dst, workers, n // 2 + 3, resume=True)  # killed once more
        problems += [f"{n}, again: {text}"] if (text := wrong_after_kill(digests(dst), whole)) else []
        assert forked(src, dst, workers, 0, resume=True)
        problems += [] if digests(dst) == whole else [f"{n}: {sorted(digests(dst))} differ from the whole output"]
        shutil.rmtree(dst)
    print(json.dumps({"kills": kills, "problems": problems}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
