"""Write a checkpoint shard by shard; what a kill leaves can be continued and never looks complete.

Order of the work
    1  check everything (``check``): folders, names, recipes, room on the disk; nothing is written before
    2  the journal's first line: digests of the plan
    3  each shard: ``*.partial`` (header, then tensors), fsync, fingerprint, rename, a line in the journal
    4  other files, then the index, then config.json, each by rename
    5  the journal goes away
Memory: tensors that are copied never enter the process, those that are streamed are there by pieces; those that are
computed share a fixed room, and one that needs more is computed and written alone (``recipes.Arithmetic``).
Bytes depend on the plan alone, not on workers, interruptions or time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from moepass import errors
from moepass.upcycle.checkpoint import destination
from moepass.upcycle.checkpoint.copying import SourceEnded, copy_range, write_all
from moepass.upcycle.checkpoint.destination import PARTIAL
from moepass.upcycle.checkpoint.headers import bad
from moepass.upcycle.checkpoint.journal import JOURNAL, Finished, Journal, fingerprint
from moepass.upcycle.checkpoint.recipes import (
    Arithmetic,
    as_bytes,
    check_recipes,
    one_torch_thread,
    plan_digests,
    streamed,
)
from moepass.upcycle.checkpoint.shards import MAX_SHARD_SIZE, Shard, index_json, index_name, plan_shards
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import OutTensor, Streamed, Verbatim

#: Two: one computes or waits for fsync while the other copies.
WORKERS = 2


@dataclass(frozen=True)
class Progress:
    """A step that has just been done.

    ``step``  "header", "tensor", "written" (all of a shard), "renamed", "shard" (it is in the journal), "file",
              "complete"
    ``done``, ``total``  bytes of all shards
    """

    step: str
    name: str
    done: int
    total: int


@dataclass(frozen=True)
class WriteReport:
    """What a run did.  Sizes in bytes; ``shards`` as (name, size) in order; ``skipped``: finished by an earlier run."""

    folder: Path
    shards: tuple[tuple[str, int], ...]
    nbytes: int
    skipped: tuple[str, ...]
    copied: int
    computed: int
    seconds: float
    plan: dict[str, str]


class _Stopped(Exception):
    """Another worker failed."""


@dataclass
class _Run:
    """State that the workers share."""

    target: Path
    source: Source
    journal: Journal
    arithmetic: Arithmetic
    progress: Callable[[Progress], None] | None
    total: int
    done: int = 0
    copied: int = 0
    computed: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def pause(self) -> None:
        if self.stop.is_set():
            raise _Stopped

    def step(self, step: str, name: str, nbytes: int = 0) -> None:
        with self.lock:
            self.done += nbytes
            if self.progress is not None:
                self.progress(Progress(step, name, self.done, self.total))


def check(
    dst: str | os.PathLike[str],
    tensors: Sequence[OutTensor],
    source: Source,
    files: Mapping[str, bytes],
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    resume: bool = False,
    stem: str = "model",
) -> tuple[Shard, ...]:
    """The plan of ``write``, after every check that needs no writing (for ``--dry-run``).

    Raises ``BadDestination``, ``BadOutTensor``, ``BadOption``, ``BadCheckpoint`` (the source changed).
    """
    target = Path(dst)
    shards = plan_shards(tensors, max_shard_size, stem)
    check_recipes(tensors, source)
    destination.check_folders(source.folder, target, resume=resume)
    destination.check_files(target, files, [*(s.name for s in shards), index_name(shards)])
    source.check_unchanged()
    if not resume:
        destination.check_space(target, _bytes_of(shards, files))
    return shards


def write(
    dst: str | os.PathLike[str],
    tensors: Sequence[OutTensor],
    source: Source,
    files: Mapping[str, bytes],
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    resume: bool = False,
    workers: int = WORKERS,
    progress: Callable[[Progress], None] | None = None,
    stem: str = "model",
) -> WriteReport:
    """Write ``tensors`` and ``files`` (relative path -> content; config.json among them) into the folder ``dst``.

    ``files``     their content belongs to the plan: no times, no names of machines in it
    ``resume``    continue an interrupted run of the same plan; also fine where it had finished, or had not begun
    ``workers``   shards that are written side by side
    ``progress``  called after each step, by one thread at a time; what it raises stops the run
    ``stem``      how the names of the files with tensors, and of their index, begin
    Raises the errors of ``check``, and ``BadDestination`` for a full disk or a plan that differs from the journal's.
    After a failure the finished shards and the journal stay, the rest is removed.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise errors.BadOption(name="workers", value=workers, detail="it must be an integer of at least 1")
    start = time.perf_counter()
    target = Path(dst)
    shards = check(target, tensors, source, files, max_shard_size=max_shard_size, resume=resume, stem=stem)
    plan = plan_digests(shards, files, source)
    if resume and _is_complete(target, shards, files):
        return _report(target, shards, tuple(s.name for s in shards), 0, 0, start, plan)
    new = destination.make_folder(target)
    try:
        journal = Journal.open(target)
        try:
            skipped, run = _begin(target, shards, files, source, journal, plan, progress)
            _write_all(run, [s for s in shards if s.name not in skipped], workers)
            _write_files(run, shards, files)
            journal.remove()
        except BaseException:
            _clean_up(journal, shards, files, target if new else None)
            raise
    except OSError as e:
        destination.failed(target, e)
    run.step("complete", str(target))
    return _report(target, shards, skipped, run.copied, run.computed, start, plan)


def _report(
    target: Path,
    shards: Sequence[Shard],
    skipped: tuple[str, ...],
    copied: int,
    computed: int,
    start: float,
    plan: dict[str, str],
) -> WriteReport:
    sizes = tuple((s.name, s.nbytes) for s in shards)
    total = sum(size for _, size in sizes)
    return WriteReport(target, sizes, total, skipped, copied, computed, time.perf_counter() - start, plan)


def _bytes_of(shards: Sequence[Shard], files: Mapping[str, bytes]) -> int:
    return sum(s.nbytes for s in shards) + sum(len(content) for content in files.values()) + len(index_json(shards))


def _index(shards: Sequence[Shard]) -> tuple[str, bytes] | None:
    return (index_name(shards), index_json(shards)) if len(shards) > 1 else None


def _is_complete(target: Path, shards: Sequence[Shard], files: Mapping[str, bytes]) -> bool:
    """Whether the folder holds this very output: all files byte by byte, shards by size and header."""
    if (target / JOURNAL).exists():
        return False
    for name, content in destination.final_order(files, _index(shards)):
        if not (target / name).is_file() or (target / name).read_bytes() != content:
            return False
    return all(_fits(target / s.name, s) for s in shards)


def _fits(path: Path, shard: Shard) -> bool:
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


def _begin(
    target: Path,
    shards: Sequence[Shard],
    files: Mapping[str, bytes],
    source: Source,
    journal: Journal,
    plan: dict[str, str],
    progress: Callable[[Progress], None] | None,
) -> tuple[tuple[str, ...], _Run]:
    """What is finished already; the journal then belongs to this plan, and half-written files are gone."""
    if journal.plan is None:
        _refuse_foreign(target)
        journal.begin(plan)
    _compare(target, journal.plan or {}, plan)
    destination.remove_partials(target, [*(s.name for s in shards), *files, index_name(shards)])
    skipped = tuple(s.name for s in shards if _is_finished(target, s, journal))
    left = [s for s in shards if s.name not in skipped]
    if left:  # a reader must not take the folder for complete while shards are written
        for name in (index_name(shards), "config.json"):
            (target / name).unlink(missing_ok=True)
    destination.check_space(target, _bytes_of(left, files) if left else 0)
    total = sum(s.nbytes for s in shards)
    done = total - sum(s.nbytes for s in left)
    return skipped, _Run(target, source, journal, Arithmetic(source), progress, total, done)


def _refuse_foreign(target: Path) -> None:
    """A folder without a begun journal must be empty (but for the journal itself)."""
    content = sorted(set(os.listdir(target)) - {JOURNAL})
    if content:
        detail = f"it holds {content[0]} and no journal of an interrupted run"
        destination.refuse(target, "nothing_to_resume", detail, "choose an empty folder, or run without --resume")


def _compare(target: Path, before: dict[str, str], now: dict[str, str]) -> None:
    different = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if different:
        detail = f"it was begun with another plan: {', '.join(different)} differ"
        destination.refuse(target, "plan_changed", detail, "repeat the first command exactly, or empty the folder")


def _is_finished(target: Path, shard: Shard, journal: Journal) -> bool:
    entry = journal.finished.get(shard.name)
    path = target / shard.name
    return entry is not None and _fits(path, shard) and fingerprint(path) == entry.fingerprint


def _write_all(run: _Run, shards: Sequence[Shard], workers: int) -> None:
    with one_torch_thread() as alone, ThreadPoolExecutor(workers, "moepass-writer", initializer=alone) as pool:
        futures = [pool.submit(_write_shard, run, shard) for shard in shards]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if any(f.done() and f.exception() for f in futures) or not all(f.done() for f in futures):
                run.stop.set()
                pool.shutdown(cancel_futures=True)
    raised = [e for f in futures if not f.cancelled() and (e := f.exception())]
    for error in sorted(raised, key=lambda e: isinstance(e, _Stopped)):
        raise error
    run.source.check_unchanged()


def _write_shard(run: _Run, shard: Shard) -> None:
    run.pause()
    path = run.target / shard.name
    partial = path.with_name(shard.name + PARTIAL)
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, shard.header, 0)
        run.step("header", shard.name, len(shard.header))
        for t, offset in zip(shard.tensors, shard.offsets, strict=True):
            _write_tensor(run, t, fd, offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    run.source.check_unchanged()
    entry = Finished(shard.nbytes, fingerprint(partial))
    run.step("written", shard.name)
    partial.replace(path)
    destination.sync_folder(run.target)
    run.step("renamed", shard.name)
    with run.lock:
        run.journal.finish(shard.name, entry)
    run.step("shard", shard.name)


def _write_tensor(run: _Run, t: OutTensor, fd: int, offset: int) -> None:
    run.pause()
    if isinstance(t.recipe, Verbatim):
        _copy(run, t.recipe.source, fd, offset)
    elif isinstance(t.recipe, Streamed):
        for made in streamed(t, t.recipe, run.source):
            run.pause()
            write_all(fd, as_bytes(made), offset)
            offset += made.nbytes
    else:
        with run.arithmetic.computed(t, t.recipe) as made:
            write_all(fd, as_bytes(made), offset)
    with run.lock:
        run.copied += t.nbytes if isinstance(t.recipe, Verbatim) else 0
        run.computed += 0 if isinstance(t.recipe, Verbatim) else t.nbytes
    run.step("tensor", t.name, t.nbytes)


def _copy(run: _Run, name: str, fd: int, offset: int) -> None:
    header = run.source.headers[name]
    source = os.open(header.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        copy_range(source, header.begin, fd, offset, header.nbytes, run.pause)
    except SourceEnded:
        bad(header.file, "changed", f"it ended while {name!r} was copied", "do not touch SRC during a run")
    finally:
        os.close(source)


def _write_files(run: _Run, shards: Sequence[Shard], files: Mapping[str, bytes]) -> None:
    for name, content in destination.final_order(files, _index(shards)):
        destination.put(run.target / name, content)
        run.step("file", name)


def _clean_up(journal: Journal, shards: Sequence[Shard], files: Mapping[str, bytes], made: Path | None) -> None:
    """After a failure: no half-written files; no journal either where no shard is finished."""
    target = journal.path.parent
    destination.remove_partials(target, [*(s.name for s in shards), *files, index_name(shards)])
    if journal.plan is None:  # a folder that is not ours
        journal.remove()
    elif not journal.finished and set(os.listdir(target)) == {JOURNAL}:
        journal.remove()
        if made is not None:
            made.rmdir()
    journal.close()
