"""The cache folder under attack: two processes at once, a kill in the middle of writing, files nobody should write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from moepass.lowering import cache

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


def test_two_processes_that_calibrate_at_once_leave_one_whole_profile(tmp_path, monkeypatch, caplog):
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
