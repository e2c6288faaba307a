"""How much is tried: little in CI, more by ``make fuzz``, which says how many inputs each file tried."""

from __future__ import annotations

import fuzzing


def pytest_terminal_summary(terminalreporter):
    """One line per kind of input; only where they were drawn for exploration."""
    if fuzzing.EXPLORING:
        for kind, count in sorted(fuzzing.tried.items()):
            terminalreporter.write_line(f"fuzz: {count} {kind}")
