"""kill -9 anywhere, then resume: byte-identical output; a journal that does not fit is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moepass.errors import BadDestination
from moepass.upcycle.checkpoint import journal as journals
from moepass.upcycle.checkpoint import recipes, writer
from moepass.upcycle.checkpoint.journal import JOURNAL, Finished, Journal, fingerprint
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import Computed, OutTensor, Verbatim

SCRIPT = Path(__file__).with_name("kill_everywhere.py")
FILES = {"config.json": b"{}"}


@pytest.fixture
def source(sharded: Path) -> Source:
    return Source.open(sharded)


def plan(source: Source, digest: str = "twice") -> list[OutTensor]:
    made = [OutTensor(n, h.shape, h.dtype, Verbatim(n)) for n, h in source.headers.items()]
    h = source.headers["model.layers.0.norm.weight"]
    return [*made, OutTensor("n", h.shape, h.dtype, Computed((h.name,), lambda x: x * 2, digest))]


def write(source: Source, dst: Path, tensors=None, files=FILES, **kwargs):
    kwargs = {"max_shard_size": 4700, "workers": 1} | kwargs
    return writer.write(dst, plan(source) if tensors is None else tensors, source, files, **kwargs)


def interrupt(source: Source, dst: Path, after: int = 2) -> None:
    """Stop when ``after`` shards are finished."""
    left = [after]

    def progress(p):
        left[0] -= p.step == "shard"
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, dst, progress=progress)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def refusal(call) -> tuple[str, str]:
    with pytest.raises(BadDestination) as caught:
        call()
    return caught.value.fields["reason"], str(caught.value)


@pytest.fixture
def quick_folder():
    """In memory where there is such a place: hundreds of fsync take their time on a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stride"), [(1, 2), (2, 7)])
def test_a_kill_before_any_system_call_and_a_resume_give_identical_bytes(sharded, quick_folder, workers, stride):
    """Every second call with one worker (``stride`` 1 tries all); fewer with two, whose order is not fixed anyway."""
    command = [sys.executable, "-P", str(SCRIPT), str(sharded), quick_folder, str(workers), str(stride)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["problems"] == []
    assert result["kills"] * stride > 60


def test_finished_shards_are_not_written_again(source, tmp_path):
    interrupt(source, tmp_path / "dst")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "dst").glob("*.safetensors")}
    report = write(source, tmp_path / "dst", resume=True)
    assert len(before) == 2
    assert set(report.skipped) == set(before)
    assert {name: (tmp_path / "dst" / name).stat().st_mtime_ns for name in before} == before


def test_a_finished_shard_that_was_damaged_is_written_again(source, tmp_path):
    write(source, tmp_path / "whole")
    interrupt(source, tmp_path / "dst")
    victim = sorted((tmp_path / "dst").glob("*.safetensors"))[0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    report = write(source, tmp_path / "dst", resume=True)
    assert victim.name not in report.skipped
    assert content(tmp_path / "dst") == content(tmp_path / "whole")


def test_a_journal_cut_anywhere_is_continued(source, tmp_path):
    write(source, tmp_path / "whole")
    interrupt(source, tmp_path / "dst")
    state, journal = content(tmp_path / "dst"), (tmp_path / "dst" / JOURNAL).read_bytes()
    first = journal.index(b"\n")
    for cut in range(first + 1, len(journal) + 1, 7):
        for name, data in state.items():
            (tmp_path / "dst" / name).write_bytes(data)
        (tmp_path / "dst" / JOURNAL).write_bytes(journal[:cut])
        write(source, tmp_path / "dst", resume=True)
        assert content(tmp_path / "dst") == content(tmp_path / "whole")


def test_a_journal_whose_first_line_was_cut_starts_anew(source, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / JOURNAL).write_bytes(b'{"format": 1, "pl')
    write(source, tmp_path / "dst", resume=True)
    assert JOURNAL not in content(tmp_path / "dst")


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b'{"shard": "x"}\n', b'{"format": 99, "plan": {}}\n'])
def test_a_damaged_journal_is_refused_and_kept(source, tmp_path, line):
    interrupt(source, tmp_path / "dst")
    path = tmp_path / "dst" / JOURNAL
    path.write_bytes(line + path.read_bytes() if b"99" in line else path.read_bytes() + line)
    before = content(tmp_path / "dst")
    reason, text = refusal(lambda: write(source, tmp_path / "dst", resume=True))
    assert reason == "bad_journal"
    assert "line" in text
    assert content(tmp_path / "dst") == before


def test_another_plan_is_refused_and_the_difference_is_named(source, tmp_path, sharded, monkeypatch):
    interrupt(source, tmp_path / "dst")
    before = content(tmp_path / "dst")

    def changed(**kwargs):
        reason, text = refusal(lambda: write(source, tmp_path / "dst", resume=True, **kwargs))
        assert reason == "plan_changed"
        assert content(tmp_path / "dst") == before
        return text

    assert "recipes differ" in changed(tensors=plan(source, "thrice"))
    assert "files differ" in changed(files={"config.json": b"[]"})
    assert "shards differ" in changed(max_shard_size=5200)
    monkeypatch.setattr(recipes.torch, "__version__", "9.9")
    assert "versions differ" in changed()
    monkeypatch.undo()
    os.utime(next(iter(source.state)), ns=(1, 1))
    source = Source.open(sharded)
    assert "source differ" in changed()


def test_a_plan_without_arithmetic_does_not_depend_on_torch(source, monkeypatch):
    copies = plan(source)[:-1]
    shards = writer.plan_shards(copies)
    before = recipes.plan_digests(shards, FILES, source)
    monkeypatch.setattr(recipes.torch, "__version__", "9.9")
    assert recipes.plan_digests(shards, FILES, source) == before


def test_without_resume_an_interrupted_folder_is_refused_with_the_hint(source, tmp_path):
    interrupt(source, tmp_path / "dst")
    reason, text = refusal(lambda: write(source, tmp_path / "dst"))
    assert reason == "not_empty"
    assert "--resume" in text


def test_a_folder_of_somebody_else_cannot_be_resumed_and_stays_as_it_is(source, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "notes.txt").write_text("mine")
    reason, _ = refusal(lambda: write(source, tmp_path / "dst", resume=True))
    assert reason == "nothing_to_resume"
    assert content(tmp_path / "dst") == {"notes.txt": b"mine"}


def test_resuming_a_finished_run_changes_nothing_and_a_different_one_is_refused(source, tmp_path):
    write(source, tmp_path / "dst")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "dst").iterdir()}
    report = write(source, tmp_path / "dst", resume=True)
    assert len(report.skipped) == len(report.shards)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "dst").iterdir()} == before
    reason, _ = refusal(lambda: write(source, tmp_path / "dst", files={"config.json": b"[]"}, resume=True))
    assert reason == "nothing_to_resume"


def test_config_disappears_while_a_lost_shard_is_written_again(source, tmp_path):
    """Killed after config.json and before the journal went away, then a shard was lost."""
    seen = []

    def stop(p):
        if (p.step, p.name) == ("file", "config.json"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "dst", progress=stop)
    dst = tmp_path / "dst"
    assert (dst / "config.json").exists()
    next(dst.glob("*.safetensors")).unlink()
    write(source, dst, resume=True, progress=lambda p: seen.append((p.step, (dst / "config.json").exists())))
    assert [exists for step, exists in seen if step == "tensor"] == [False] * sum(step == "tensor" for step, _ in seen)
    assert (dst / "config.json").exists()


def test_the_fingerprint_of_a_large_file_sees_its_size_its_ends_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "_BLOCK", 8)
    path = tmp_path / "x"
    data = bytearray(os.urandom(64 * 8 + 640))
    path.write_bytes(data)
    before = fingerprint(path)
    assert fingerprint(path) == before
    for change in (0, 7, len(data) - 1):
        other = bytearray(data)
        other[change] ^= 1
        path.write_bytes(other)
        assert fingerprint(path) != before
    path.write_bytes(data + b"\0")
    assert fingerprint(path) != before


def test_the_journal_remembers(tmp_path):
    journal = Journal.open(tmp_path)
    journal.begin({"source": "a"})
    journal.finish("s", Finished(3, "f"))
    journal.close()
    again = Journal.open(tmp_path)
    assert (again.plan, again.finished) == ({"source": "a"}, {"s": Finished(3, "f")})
    again.remove()
    assert list(tmp_path.iterdir()) == []
