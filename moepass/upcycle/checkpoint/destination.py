"""The folder that is written: may it be, does it have room, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NoReturn

from moepass import errors
from moepass.upcycle.checkpoint.journal import JOURNAL

PARTIAL = ".partial"
#: Journal, folders, rounding to blocks.
_SLACK = 4 << 20


def refuse(path: Path, reason: str, detail: str, remedy: str) -> NoReturn:
    """Raise ``BadDestination``."""
    raise errors.BadDestination(path=path, reason=reason, detail=detail, remedy=remedy)


def check_folders(source: Path, target: Path, *, resume: bool) -> None:
    """Raise ``BadDestination`` where the two folders overlap, or the target holds files and ``resume`` is False."""
    src, dst = source.resolve(), target.resolve()
    if src == dst:
        refuse(target, "same_folder", "it is the source", "choose another folder")
    if dst.is_relative_to(src):
        refuse(target, "inside_source", f"it is inside the source {source}", "choose a folder beside it")
    if src.is_relative_to(dst):
        refuse(target, "holds_source", f"it contains the source {source}", "choose a folder beside the source")
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        refuse(target, "not_a_folder", "it is a file", "choose another name")
    try:
        content = sorted(os.listdir(target))
    except OSError as e:
        refuse(target, "read_only", f"{e.strerror}", "check its permissions")
    if not content or resume:
        return
    remedy = "choose an empty folder"
    if JOURNAL in content:
        remedy = "continue the interrupted run with --resume, or choose an empty folder"
    refuse(target, "not_empty", f"it is not empty ({content[0]} ...)", remedy)


def check_files(target: Path, files: Iterable[str], shards: Iterable[str]) -> None:
    """Raise ``BadDestination`` where a name of ``files`` leaves the folder or is taken."""
    taken = {*shards, JOURNAL, "model.safetensors", "model.safetensors.index.json"}
    for name in files:
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name:
            refuse(target, "bad_name", f"{name!r} is not a path inside it", "rename the file")
        if name in taken or name.endswith(PARTIAL):
            refuse(target, "bad_name", f"{name!r} is a name that the writer needs", "rename the file")


def check_space(target: Path, needed: int) -> None:
    """Raise ``BadDestination`` where the file system has less than ``needed`` bytes for us."""
    place = target
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    if free < needed + _SLACK:
        detail = f"it needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free"
        refuse(target, "no_space", detail, "make room, or choose another disk")


def make_folder(target: Path) -> bool:
    """Create it with its parents; whether it was new.  Raises ``BadDestination`` where it cannot be written."""
    new = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        failed(target, e)
    return new


def failed(target: Path, error: OSError) -> NoReturn:
    """Raise ``BadDestination`` for what the system refused."""
    if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        refuse(target, "read_only", str(error), "check its permissions, or choose another folder")
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        refuse(target, "no_space", "the disk is full", "make room and run again with --resume")
    refuse(target, "io", str(error), "repair the cause and run again with --resume")


def sync_folder(folder: Path) -> None:
    """Make renames in it durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def put(path: Path, content: bytes) -> None:
    """A small file, by rename and synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def final_order(files: Mapping[str, bytes], index: tuple[str, bytes] | None) -> list[tuple[str, bytes]]:
    """Others, then the index, then config.json: without it no reader takes the folder for a checkpoint."""
    last = "config.json"
    ordered = sorted(item for item in files.items() if item[0] != last)
    return [*ordered, *([index] if index else []), *([(last, files[last])] if last in files else [])]


def remove_partials(target: Path, names: Iterable[str]) -> None:
    """What a killed run left half written."""
    for name in names:
        (target / f"{name}{PARTIAL}").unlink(missing_ok=True)
