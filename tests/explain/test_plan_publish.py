"""The latest plan, the loggers, the trace artifacts, the dump folder, and the package that is also a function."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from plan_samples import lowered, model, report, small

import moepass.explain
import moepass.preview
from moepass import _compat
from moepass.explain import files, store, trace
from moepass.explain.report import PlanReport


@pytest.fixture(autouse=True)
def _restore_store(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "_latest", None)
    monkeypatch.setattr(trace, "_warned", set())
    monkeypatch.delenv("MOEPASS_DUMP", raising=False)


def test_last_plan_is_none_until_something_is_recorded():
    assert store.last_plan() is None
    store.record(report())
    store.record(model())
    assert store.last_plan() == model()


def test_one_line_per_compile_at_info(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="moepass")
    trace.emit(model(), lambda: "before", lambda: "after")
    assert [(r.name, r.getMessage()) for r in caplog.records] == [
        ("moepass.plan", f"{model().headline}, fingerprint {model().fingerprint}")
    ]


def test_the_tree_and_the_near_misses_appear_at_debug(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, logger="moepass")
    trace.emit(model(), lambda: "before", lambda: "after")
    messages = [(r.name, r.getMessage()) for r in caplog.records]
    assert ("moepass.plan", model().to_text()) in messages
    assert ("moepass.match", "model.layers.2.side: skipped hidden_escapes: mul is also read by sum") in messages


def test_nothing_lowered_is_a_warning_once_per_configuration(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, logger="moepass")
    for _ in range(3):
        trace.emit(report(), str, str)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "0 SITES" in caplog.text


def test_a_graph_that_nobody_asks_for_is_not_printed(tmp_path: Path):
    code = (
        "import torch; from moepass.explain import trace; from moepass.explain.report import PlanReport;"
        "trace.emit(PlanReport.from_json(open('plan.json').read()), lambda: 1 / 0, lambda: 1 / 0)"
    )
    (tmp_path / "plan.json").write_text(model().to_json())
    quiet = {name: value for name, value in os.environ.items() if name not in {"TORCH_TRACE", "MOEPASS_DUMP"}}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=quiet, check=True)


def test_artifacts_have_the_documented_names(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, tuple[str, str]] = {}

    def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
        seen[name] = (encoding, payload())

    monkeypatch.setattr(_compat, "trace_artifact", trace_artifact)
    trace.emit(model(), lambda: "BEFORE", lambda: "AFTER")
    assert seen == {
        "moepass_plan": ("json", model().to_json()),
        "moepass_plan_tree": ("string", model().to_text()),
        "moepass_graph_before": ("string", "BEFORE"),
        "moepass_graph_after": ("string", "AFTER"),
    }


def test_dump_writes_the_four_files_and_overwrites_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "new" / "dump"
    monkeypatch.setenv("MOEPASS_DUMP", str(folder))
    trace.emit(report(), lambda: "old", lambda: "old")
    trace.emit(model(), lambda: "def before(): ...", lambda: "def after(): ...")
    assert sorted(p.name for p in folder.iterdir()) == [
        "010_plan.json",
        "011_plan.txt",
        "020_before.py",
        "021_after.py",
    ]
    assert PlanReport.from_json((folder / "010_plan.json").read_text()) == model()
    assert (folder / "020_before.py").read_text() == "def before(): ..."


def test_dump_of_several_ranks_goes_to_one_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOEPASS_DUMP", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    trace.emit(model(), str, str)
    assert (tmp_path / "rank1" / "010_plan.json").is_file()
    monkeypatch.setenv("WORLD_SIZE", "")
    trace.emit(model(), str, str)
    assert (tmp_path / "010_plan.json").is_file()


def test_a_dump_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MOEPASS_DUMP", str(tmp_path / "file"))
    trace.emit(model(), str, str)
    assert "MOEPASS_DUMP" in caplog.text


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "plan.txt"
    files.write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomic(path, "new \udc80")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.txt"]
    assert path.read_text() == "old"


def test_calling_the_package_explains(monkeypatch: pytest.MonkeyPatch):
    def explain(fn: object, **options: object) -> object:
        return lambda *args: (fn, options, args)

    monkeypatch.setitem(sys.modules, "moepass.preview.model", types.SimpleNamespace(explain=explain))
    monkeypatch.setattr(moepass.preview, "model", sys.modules["moepass.preview.model"], raising=False)
    assert moepass.explain("model", hardware="H100")(1, 2) == ("model", {"hardware": "H100"}, (1, 2))
    assert moepass.explain.report.PlanReport is PlanReport


def test_the_report_and_its_package_load_without_torch():
    code = (
        "import sys, moepass, moepass.explain, moepass.explain.report, moepass.explain.store, moepass.explain.text;"
        "import moepass.explain.diff_text;"
        "assert callable(moepass.explain); print('torch' in sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "False"


def test_torch_logs_shows_the_line_and_torch_trace_receives_the_plan(tmp_path: Path):
    code = (
        "import torch; from moepass.explain import trace; from moepass.explain.report import PlanReport;"
        "trace.emit(PlanReport.from_json(open('plan.json').read()), lambda: 'B', lambda: 'A')"
    )
    (tmp_path / "plan.json").write_text(report(lowered("a", small())).to_json())
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "TORCH_LOGS": "+moepass", "TORCH_TRACE": str(tmp_path / "trace")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "1 candidates: 1 lowered" in child.stderr
    assert "moepass plan v1" in child.stderr
    (log,) = (tmp_path / "trace").iterdir()
    metadata = [json.loads(line.split("] ", 1)[1]) for line in log.read_text().splitlines() if '"artifact"' in line]
    assert {m["artifact"]["name"] for m in metadata} >= {
        "moepass_plan",
        "moepass_plan_tree",
        "moepass_graph_before",
        "moepass_graph_after",
    }
