"""The report of the latest compile in this process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moepass.explain.report import PlanReport

_lock = threading.Lock()
_latest: PlanReport | None = None


def record(report: PlanReport) -> None:
    """Make ``report`` the answer of `last_plan`."""
    global _latest
    with _lock:
        _latest = report


def last_plan() -> PlanReport | None:
    """The report of the latest compile in this process, or None if nothing was compiled yet."""
    with _lock:
        return _latest
