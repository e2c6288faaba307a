"""``moepass emit`` killed in the middle of its files: no folder of that name, and the next run makes it whole."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

from moepass.explain.files import write_folder

FILES = {"a/forward_up.py": "up", "a/moe.py": "moe", "plan.json": "{}"}

#: Writes FILES and stops for ever before the last, as a slow disk would.
_STUCK = """
import json, sys, time
from pathlib import Path
from moepass.explain import files
write, count = Path.write_text, []
def slow(path, *args, **kwargs):
    if len(count) == 2:
        print("two files are there", flush=True)
        time.sleep(600)
    count.append(path)
    return write(path, *args, **kwargs)
Path.write_text = slow
files.write_folder(Path(sys.argv[1]), json.loads(sys.argv[2]))
"""


def test_a_kill_leaves_no_folder_and_the_next_run_is_whole(tmp_path):
    target = tmp_path / "kernels"
    command = [sys.executable, "-c", _STUCK, str(target), json.dumps(FILES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "two files are there\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    write_folder(target, FILES)
    found = {str(p.relative_to(target)): p.read_text() for p in target.rglob("*") if p.is_file()}
    assert found == FILES
