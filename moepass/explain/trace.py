"""Where a compile leaves its plan: loggers, torch's structured trace, and a folder of files.

``TORCH_LOGS="moepass"``       one line per compile on logger ``moepass.plan`` (``"+moepass"``: the tree, and every
                               near miss on logger ``moepass.match``)
``TORCH_TRACE=dir``            artifacts ``moepass_plan`` (json), ``moepass_plan_tree``, ``moepass_graph_before`` and
                               ``moepass_graph_after`` (string), which tlparse shows under the compile they belong to
``MOEPASS_DUMP=dir``           010_plan.json, 011_plan.txt, 020_before.py, 021_after.py of the latest compile; under
                               torchrun in a sub-folder per rank
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from moepass.explain import phrases
from moepass.explain.files import write_atomic
from moepass.explain.report import PlanReport
from moepass.lowering import machine

plan_log = logging.getLogger("moepass.plan")
match_log = logging.getLogger("moepass.match")

View = Callable[[], str]

_warned: set[str] = set()
_warned_lock = threading.Lock()


def emit(report: PlanReport, before: View, after: View) -> None:
    """Publish a compile's report and its graph (as Python source, made only if asked for) before and after.

    Never raises for want of a place to write: a dump that fails is a warning in the log.
    """
    _log(report)
    _trace(report, before, after)
    folder = os.environ.get("MOEPASS_DUMP")
    if folder:
        _dump(Path(folder), report, before, after)


def _log(report: PlanReport) -> None:
    warning = phrases.alarm(report)
    if warning is not None and _first_time(report.fingerprint):
        plan_log.warning("%s", warning)
    plan_log.info("%s, fingerprint %s", report.headline, report.fingerprint)
    if plan_log.isEnabledFor(logging.DEBUG):
        plan_log.debug("%s", report.to_text())
    for site in report.sites:
        if site.status != "lowered":
            match_log.debug("%s: %s %s: %s", site.id, site.status, site.reason, site.detail or "no detail")


def _trace(report: PlanReport, before: View, after: View) -> None:
    from moepass._compat import trace_artifact

    trace_artifact("moepass_plan", "json", report.to_json)
    trace_artifact("moepass_plan_tree", "string", report.to_text)
    trace_artifact("moepass_graph_before", "string", before)
    trace_artifact("moepass_graph_after", "string", after)


def _dump(folder: Path, report: PlanReport, before: View, after: View) -> None:
    if machine.one_of_many():
        folder = folder / f"rank{os.environ.get('RANK', '0')}"
    views: dict[str, View] = {
        "010_plan.json": report.to_json,
        "011_plan.txt": report.to_text,
        "020_before.py": before,
        "021_after.py": after,
    }
    try:
        for name, view in views.items():
            write_atomic(folder / name, view())
    except OSError as error:
        plan_log.warning("MOEPASS_DUMP=%s: nothing written there: %s", folder, error)


def _first_time(fingerprint: str) -> bool:
    """One warning per configuration: graph breaks make many graphs without a feed-forward block."""
    with _warned_lock:
        new = fingerprint not in _warned
        _warned.add(fingerprint)
        return new
