"""The cache folder under attack: processes at once, a kill in the middle, files nobody should write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moepass.lowering import cache, hardware

#: Writes profiles of different lengths, over and over; prints a line when it begins.
WRITER = """
import sys
from moepass.lowering import cache
print("begun", flush=True)
for turn in range(int(sys.argv[1])):
    cache.write("profile.json", {"who": sys.argv[2], "filler": sys.argv[2] * (1 + turn % 7 * 1000)})
"""


def writer(folder, turns: int, who: str) -> subprocess.Popen[str]:
    """A process that writes ``profile.json`` many times, once it said so."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(turns), who],
        env=os.environ | {"MOEPASS_CACHE_DIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_calibrating_in_two_processes_while_a_third_is_killed_leaves_the_whole_profile_of_one(tmp_path, monkeypatch):
    """The command itself, start to end (``calibrate_at_once.py``)."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # a profile is one of so many threads
    subprocess.run([sys.executable, Path(__file__).with_name("calibrate_at_once.py"), tmp_path], check=True)
    kept = cache.read(hardware.profile_file("cpu"))
    assert kept is not None
    assert kept["profile"] in [json.loads((tmp_path / name).read_text()) for name in "01"]
    assert (tmp_path / "2").read_text() == ""
    assert [path.suffix for path in folder.iterdir() if path.suffix != ".so"] == [".json"], (
        "nothing is left of the one that was killed"
    )
    loaded = hardware.load_hardware(None)
    assert loaded.model_dump(mode="json") == kept["profile"]


def test_a_reader_sees_one_whole_profile_while_two_processes_write_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(tmp_path))
    writers = [writer(tmp_path, 300, who) for who in "ab"]
    seen = set()
    while any(p.poll() is None for p in writers):
        content = cache.read("profile.json")
        if content is not None:
            assert set(content["filler"]) == {content["who"]}
            seen.add(content["who"])
    assert [p.wait() for p in writers] == [0, 0]
    assert seen
    assert not caplog.records, "a reader never saw half a file"
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def test_a_kill_while_a_profile_is_written_leaves_the_last_whole_one(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(tmp_path))
    cache.write("profile.json", {"who": "before", "filler": "before"})
    process = writer(tmp_path, 10**6, "a")
    process.send_signal(signal.SIGKILL)
    process.wait()
    content = cache.read("profile.json")
    assert content is not None
    assert content["who"] in ("before", "a")
    assert not caplog.records
    cache.write("profile.json", {"who": "after"})
    assert cache.read("profile.json") == {"who": "after"}


@pytest.mark.parametrize("text", ["[" * 200_000, "\ufeff{}", "{", "7", json.dumps([1]), ""])
def test_a_file_that_holds_no_object_is_ignored_with_a_warning(text, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MOEPASS_CACHE_DIR", str(tmp_path))
    (tmp_path / "profile.json").write_text(text)
    assert cache.read("profile.json") is None
    assert caplog.text.count("ignoring the cache file") == 1
