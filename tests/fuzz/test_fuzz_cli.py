"""Random command lines: exit code 0, 1 or 2, an error in one line, never a traceback."""

from __future__ import annotations

import fuzzing
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moepass.cli import app

NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), (torch.randn(3, 8),)

def bad():
    return 7
"""
OPTIONS = {
    "explain": ["--tokens", "--hardware", "--dtype", "--format", "--experts", "--top-k", "--routing", "--require"],
    "sweep": ["--tokens", "--hardware", "--routing", "--dtype", "--format", "--chart"],
    "diff": ["--format"],
    "upcycle": ["--experts", "--top-k", "--init", "--granularity", "--to", "--seed"],
    "verify": ["--tokens", "--dtype", "--inner", "--against"],
    "verify-checkpoint": ["--tokens"],
    "calibrate": ["--device"],
}
FLAGS = {
    "explain": ["--train", "--no-convert", "--strict"],
    "sweep": ["--train"],
    "upcycle": ["--dry-run", "--resume", "--verify"],
    "verify": ["--train"],
}
WORDS = [
    "1", "0", "-1", "8", "1,7", "99999999999999999999", "1e3", "nan", "", " ", "\u0663", "H100", "B200,A100", "nowhere",
    "float32", "int8", "json", "text", "html", "random", "skew=2", "skew=nan", "skew=-1", "balanced", "*=grouped",
    "*=x", "=", "[", "copy", "virtual-groups", "moepass", "..", "/", "/dev/null", "net.py:make", "net.py:bad",
    "net.py:gone", "gone.py:make", "os:getcwd", "json:loads", "a:b:c", ":", "::", "olmoe", "x.pt2", "plan.json",
    "\ud800",
]  # fmt: skip
#: What would take long: models that run, plans of thirty layers, measuring the machine.
SLOW = {"verify": {"net.py:make"}, "calibrate": {"cpu"}}


@st.composite
def command_lines(draw) -> list[str]:
    command = draw(st.sampled_from(sorted(OPTIONS)))
    words = st.sampled_from(WORDS) | st.text(max_size=6)
    line = [command, *draw(st.lists(words, min_size=0, max_size=2))]
    if draw(st.booleans()) and command in ("explain", "sweep"):
        line[1:2] = ["net.py:make"]
    for _ in range(draw(st.integers(0, 3))):
        line += [draw(st.sampled_from(OPTIONS[command])), draw(words)]
    if command in FLAGS:
        line += draw(st.lists(st.sampled_from(FLAGS[command]), max_size=2))
    if draw(st.integers(0, 9)) == 0:
        line.append(draw(words))
    return line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "net.py").write_text(NET)
    (folder / "plan.json").write_text('{"schema_version": "1.1"}')
    return folder


@fuzzing.inputs(40)
@given(line=command_lines())
def test_a_random_command_line_ends_in_an_answer_or_in_one_line(place, line):
    if SLOW.get(line[0], set()) & set(line):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        done = CliRunner().invoke(app, line)
    fuzzing.tried["command lines"] += 1
    fuzzing.tried["of them answered"] += done.exit_code == 0
    assert done.exit_code in (0, 1, 2), (line, done.output)
    assert done.exception is None or isinstance(done.exception, SystemExit), (line, done.exception)
    assert "Traceback" not in done.output, line
