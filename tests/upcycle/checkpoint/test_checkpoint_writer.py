"""Writing: the right bytes whatever the workers, refusals before the first write, failures that look like failures."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moepass.errors import BadCheckpoint, BadDestination, BadOption, BadOutTensor
from moepass.upcycle.checkpoint import copying, destination, recipes, writer
from moepass.upcycle.checkpoint.journal import JOURNAL, Journal
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import Computed, OutTensor, Verbatim

FILES = {"config.json": b'{"model_type": "mixtral"}', "tokenizer.json": b"{}", "extra/template.jinja": b"{{ x }}"}
LIMIT = 4700


def doubled(x):
    return (2.0 * x.float()).to(x.dtype)


def mean(x, y):
    return (x.float() + y.float()) / 2


def plan(source: Source) -> list[OutTensor]:
    """Every tensor as it is, twice the up projections, and one made from two inputs."""
    out = []
    for name, h in source.headers.items():
        out.append(OutTensor(name, h.shape, h.dtype, Verbatim(name)))
        if "up_proj" in name:
            recipe = Computed((name,), doubled, "doubled")
            out += [OutTensor(f"{name}.{e}", h.shape, h.dtype, recipe, group=name) for e in range(2)]
    pair = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    out.append(OutTensor("mean", (10, 6), "F32", Computed(pair, mean, "mean")))
    return out


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def write(source: Source, dst: Path, **kwargs):
    return writer.write(dst, plan(source), source, FILES, **({"max_shard_size": LIMIT} | kwargs))


@pytest.fixture
def source(sharded: Path) -> Source:
    return Source.open(sharded)


def reason_of(caught) -> str:
    assert caught.value.fields["remedy"]
    return caught.value.fields["reason"]


def test_the_output_opens_as_a_checkpoint_with_the_planned_values(source, tmp_path):
    report = write(source, tmp_path / "dst")
    written = Source.open(tmp_path / "dst")
    assert len(report.shards) > 2
    for t in plan(source):
        if isinstance(t.recipe, Verbatim):
            expected = source.read(t.recipe.source)
        else:
            expected = t.recipe.function(*(source.read(name) for name in t.recipe.inputs))
        assert torch.equal(written.read(t.name), expected)
        by_library = load_file(written.headers[t.name].file)[t.name]
        assert torch.equal(by_library, expected)
    assert {name: (tmp_path / "dst" / name).read_bytes() for name in FILES} == FILES


def test_the_report_counts_the_bytes_on_disk(source, tmp_path):
    report = write(source, tmp_path / "dst")
    assert dict(report.shards) == {p.name: p.stat().st_size for p in (tmp_path / "dst").glob("*.safetensors")}
    assert report.nbytes == sum(size for _, size in report.shards)
    assert report.copied == source.nbytes
    assert report.computed == 6 * 120 + 240
    assert report.skipped == ()


def test_the_bytes_do_not_depend_on_workers_or_on_how_they_are_copied(source, tmp_path, monkeypatch):
    write(source, tmp_path / "one", workers=1)
    write(source, tmp_path / "four", workers=4)
    monkeypatch.setattr(os, "copy_file_range", _other_device)
    monkeypatch.setattr(copying, "_BUFFER", 7)
    write(source, tmp_path / "buffered")
    assert digests(tmp_path / "one") == digests(tmp_path / "four") == digests(tmp_path / "buffered")
    assert JOURNAL not in digests(tmp_path / "one")


def _other_device(*args):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_one_shard_has_no_index(source, tmp_path):
    write(source, tmp_path / "dst", max_shard_size=10**9)
    assert set(digests(tmp_path / "dst")) == {"model.safetensors", *FILES}


def test_config_is_the_last_file_and_no_shard_is_seen_half_written(source, tmp_path):
    dst, seen = tmp_path / "dst", []

    def look(p):
        seen.append((p.step, p.name))
        assert p.step in {"file", "complete"} or not (dst / "config.json").exists()
        for file in dst.glob("*.safetensors"):
            assert file.stat().st_size == sizes[file.name]

    sizes = {s.name: s.nbytes for s in writer.check(dst, plan(source), source, FILES, max_shard_size=LIMIT)}
    write(source, dst, progress=look)
    assert seen[-3:] == [("file", "model.safetensors.index.json"), ("file", "config.json"), ("complete", str(dst))]


def test_progress_ends_at_the_total(source, tmp_path):
    steps = []
    report = write(source, tmp_path / "dst", progress=steps.append)
    assert [p.done for p in steps] == sorted(p.done for p in steps)
    assert steps[-1].done == steps[-1].total == report.nbytes


def test_check_writes_nothing(source, tmp_path):
    shards = writer.check(tmp_path / "dst", plan(source), source, FILES, max_shard_size=LIMIT)
    assert sum(s.nbytes for s in shards) > source.nbytes
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("where", ["same_folder", "inside_source", "holds_source", "not_a_folder", "not_empty"])
def test_a_folder_that_may_not_be_written_is_refused_and_left_alone(source, tmp_path, where):
    before = digests(source.folder)
    dst = {
        "same_folder": source.folder,
        "inside_source": source.folder / "out",
        "holds_source": tmp_path,
        "not_a_folder": source.folder.parent / "file",
        "not_empty": tmp_path / "full",
    }[where]
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(BadDestination) as caught:
        write(source, dst)
    assert reason_of(caught) == where
    assert digests(source.folder) == before
    assert digests(tmp_path / "full") == {"notes.txt": hashlib.sha256(b"mine").hexdigest()}


def test_a_link_to_the_source_is_the_source(source, tmp_path):
    (tmp_path / "link").symlink_to(source.folder)
    with pytest.raises(BadDestination) as caught:
        write(source, tmp_path / "link")
    assert reason_of(caught) == "same_folder"


def test_too_small_a_disk_is_refused_before_the_folder_is_made(source, tmp_path, monkeypatch):
    monkeypatch.setattr(destination, "_SLACK", 1 << 60)
    with pytest.raises(BadDestination, match="GB free") as caught:
        write(source, tmp_path / "dst")
    assert reason_of(caught) == "no_space"
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(("number", "reason"), [(errno.EROFS, "read_only"), (errno.EACCES, "read_only")])
def test_a_target_that_cannot_be_written_is_refused(source, tmp_path, monkeypatch, number, reason):
    def mkdir(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(BadDestination) as caught:
        write(source, tmp_path / "dst")
    assert reason_of(caught) == reason


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "model.safetensors", JOURNAL, "x.partial", ""])
def test_a_file_that_leaves_the_folder_or_takes_a_name_of_ours_is_refused(source, tmp_path, name):
    with pytest.raises(BadDestination) as caught:
        writer.write(tmp_path / "dst", plan(source), source, {name: b""})
    assert reason_of(caught) == "bad_name"
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Verbatim("ghost"), "lacks"),
        (Computed(("ghost",), doubled, ""), "lacks"),
        (Verbatim("model.embed_tokens.weight"), "should be the bytes of"),
    ],
)
def test_a_recipe_that_does_not_fit_the_source_is_refused_before_writing(source, tmp_path, recipe, words):
    with pytest.raises(BadOutTensor, match=words):
        writer.write(tmp_path / "dst", [OutTensor("t", (3,), "F32", recipe)], source, FILES)
    assert not (tmp_path / "dst").exists()


def in_place(x):
    return x.mul_(2)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x[:3], "planned as"),
        (lambda x: x.double(), "planned as"),
        (lambda x: None, "NoneType"),
        (in_place, "in place"),
        (lambda x: x * float("inf"), "overflows"),
    ],
)
def test_a_function_that_breaks_its_promise_stops_the_run_and_leaves_nothing(source, tmp_path, function, words):
    h = source.headers["model.embed_tokens.weight"]
    bad = OutTensor("t", h.shape, h.dtype, Computed((h.name,), function, ""))
    with pytest.raises(BadOutTensor, match=words):
        writer.write(tmp_path / "dst", [bad], source, FILES)
    assert not (tmp_path / "dst").exists()


def test_transposed_results_are_written_row_by_row(source, tmp_path):
    h = source.headers["model.embed_tokens.weight"]
    t = OutTensor("t", h.shape[::-1], h.dtype, Computed((h.name,), lambda x: x.T, "T"))
    writer.write(tmp_path / "dst", [t], source, FILES)
    assert torch.equal(load_file(tmp_path / "dst" / "model.safetensors")["t"], source.read(h.name).T)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failure_in_the_middle_leaves_finished_shards_and_a_journal_and_no_config(source, tmp_path, workers):
    def fail(p):
        if p.step == "shard":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "dst", progress=fail, workers=workers)
    left = set(digests(tmp_path / "dst"))
    assert JOURNAL in left
    assert not {name for name in left if name.endswith(".partial")}
    assert left - {JOURNAL} <= {name for name, _ in write(source, tmp_path / "whole").shards}  # no index, no config
    write(source, tmp_path / "dst", resume=True)
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")
    assert not [t for t in threading.enumerate() if t.name.startswith("moepass-writer")]


def test_a_full_disk_in_the_middle_says_how_to_go_on(source, tmp_path, monkeypatch):
    count = iter(range(100))

    def full(*args):
        if next(count) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    original = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(BadDestination, match="--resume") as caught:
        write(source, tmp_path / "dst", workers=1)
    assert reason_of(caught) == "no_space"
    assert not list((tmp_path / "dst").glob("*.partial"))
    assert not (tmp_path / "dst" / "config.json").exists()


def test_a_source_that_shrinks_meanwhile_is_an_error_and_no_output(source, tmp_path):
    def shrink(p):
        if p.step == "header":
            for file in source.folder.glob("*.safetensors"):
                file.write_bytes(file.read_bytes()[:600])

    with pytest.raises(BadCheckpoint, match="changed"):
        write(source, tmp_path / "dst", progress=shrink, workers=1)
    assert not (tmp_path / "dst").exists()


def test_a_second_run_on_the_same_folder_is_refused(source, tmp_path):
    (tmp_path / "dst").mkdir()
    first = Journal.open(tmp_path / "dst")
    with pytest.raises(BadDestination) as caught:
        write(source, tmp_path / "dst", resume=True)
    assert reason_of(caught) == "in_use"
    first.remove()
    write(source, tmp_path / "dst", resume=True)


@pytest.mark.parametrize("workers", [0, -1, True, 1.5])
def test_a_number_of_workers_that_makes_no_sense_is_refused(source, tmp_path, workers):
    with pytest.raises(BadOption, match="workers"):
        write(source, tmp_path / "dst", workers=workers)


def test_the_source_is_never_touched(source, tmp_path):
    def state():
        return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in source.folder.rglob("*")} | digests(source.folder)

    before = state()
    write(source, tmp_path / "dst")
    assert state() == before


def test_the_index_lists_every_tensor(source, tmp_path):
    write(source, tmp_path / "dst")
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {t.name for t in plan(source)}


def test_an_input_is_read_once_for_its_group_and_not_kept_for_the_next(source, tmp_path, monkeypatch):
    reads, caches = [], []
    original = Source.read
    monkeypatch.setattr(Source, "read", lambda self, name: reads.append(name) or original(self, name))
    arithmetic = recipes.Arithmetic(source)
    for t in plan(source):
        if isinstance(t.recipe, Computed):
            with arithmetic.computed(t, t.recipe):
                caches.append(set(arithmetic._worker.cache))
    ups = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    assert reads == [*ups, *ups[:2]]  # one read for two tensors each, and the ungrouped mean
    assert caches == [{ups[0]}] * 2 + [{ups[1]}] * 2 + [{ups[2]}] * 2 + [set()]


def test_sums_do_not_depend_on_the_threads_of_torch(source, tmp_path):
    seen, before = [], torch.get_num_threads()
    h = source.headers["model.embed_tokens.weight"]
    t = OutTensor("t", h.shape, h.dtype, Computed((h.name,), lambda x: seen.append(torch.get_num_threads()) or x, ""))
    torch.set_num_threads(3)
    try:
        writer.write(tmp_path / "dst", [t], source, FILES)
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def test_computations_share_a_room_and_a_large_one_is_alone(source, monkeypatch):
    running, together, lock = [0], [], threading.Lock()

    def watched(x):
        with lock:
            running[0] += 1
            together.append(running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return x + 1

    h = source.headers["model.layers.0.mlp.up_proj.weight"]
    t = OutTensor("t", h.shape, h.dtype, Computed((h.name,), watched, ""))

    def computed(arithmetic):
        with arithmetic.computed(t, t.recipe) as made:
            return torch.equal(made, source.read(h.name) + 1)

    one = (1 + recipes.WORKING) * h.nbytes
    for room, most in ((1 << 20, 4), (2 * one, 2), (1, 1)):
        monkeypatch.setattr(recipes, "ROOM", room)
        together.clear()
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(computed, [recipes.Arithmetic(source)] * 8))
        assert max(together) == most
