"""The journal of a run: which plan, which shards are finished.  JSON lines, each synced before the next step.

A line that a kill cut short is dropped.  The file exists only while the output is incomplete, and is locked, so that
two runs do not write one folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moepass import errors

JOURNAL = "moepass_upcycle.journal"
_FORMAT = 1
_SAMPLES, _BLOCK = 64, 1 << 16


@dataclass(frozen=True)
class Finished:
    """A shard that was renamed into place."""

    size: int
    fingerprint: str


@dataclass
class Journal:
    """Open with ``Journal.open``, close with ``close`` (keeps the file) or ``remove``."""

    path: Path
    fd: int
    plan: dict[str, str] | None = None
    finished: dict[str, Finished] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Journal:
        """Open or create, lock, read.  Raises ``BadDestination`` (in_use, bad_journal), OSError."""
        path = folder / JOURNAL
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        journal = cls(path, fd)
        try:
            _lock(path, fd)
            journal._read()
        except BaseException:
            os.close(fd)
            raise
        return journal

    def begin(self, plan: dict[str, str]) -> None:
        """Write the first line."""
        self.plan = plan
        self._append({"format": _FORMAT, "plan": plan})

    def finish(self, shard: str, entry: Finished) -> None:
        """Note a shard that is in place."""
        self.finished[shard] = entry
        self._append({"shard": shard, "size": entry.size, "fingerprint": entry.fingerprint})

    def close(self) -> None:
        """Let go of the file and the lock."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def remove(self) -> None:
        """The output is complete, or nothing of it is left."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _append(self, content: dict[str, Any]) -> None:
        line = json.dumps(content, sort_keys=True).encode() + b"\n"
        while line:
            line = line[os.write(self.fd, line) :]
        os.fsync(self.fd)

    def _read(self) -> None:
        with os.fdopen(os.dup(self.fd), "rb") as file:
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._take(number, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                detail, remedy = f"line {number} of {JOURNAL} is damaged ({e})", "empty the folder and start again"
                raise errors.BadDestination(
                    path=self.path.parent, reason="bad_journal", detail=detail, remedy=remedy
                ) from None
        os.ftruncate(self.fd, len(whole))
        os.lseek(self.fd, 0, os.SEEK_END)

    def _take(self, number: int, content: dict[str, Any]) -> None:
        if number == 1:
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}")
            self.plan = {str(key): str(value) for key, value in content["plan"].items()}
        else:
            self.finished[str(content["shard"])] = Finished(int(content["size"]), str(content["fingerprint"]))


def _lock(path: Path, fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        remedy = "wait for it, or choose another folder"
        raise errors.BadDestination(
            path=path.parent, reason="in_use", detail="another run is writing there", remedy=remedy
        ) from None
    except OSError:  # a file system without locks
        return


def fingerprint(path: Path) -> str:
    """sha256 of size and 64 blocks of 64 KiB, spread evenly (smaller files: all bytes).

    Catches truncation, holes and mixed-up files without reading a shard twice as long as it took to write.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        if size <= _SAMPLES * _BLOCK:
            digest.update(file.read())
            return digest.hexdigest()
        for i in range(_SAMPLES):
            file.seek((size - _BLOCK) * i // (_SAMPLES - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
