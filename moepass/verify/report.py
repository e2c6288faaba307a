"""What verification found: one frozen value per check, a table, JSON.

``failed``   the numbers differ by more than the tolerance, or the check raised
``skipped``  the check says nothing about this model; its detail says why
A report without a single check that passed is not ``ok``: nothing was verified.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moepass import errors

Status = Literal["ok", "failed", "skipped"]
_STYLE = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


class Check(BaseModel):
    """One comparison.

    ``subject``    what was compared: ``compiled``, a lowering, a block's name
    ``name``       what was compared about it
    ``error``      the largest difference relative to the scale (see ``moepass.verify.compare``); None: not a difference
    ``tolerance``  what ``error`` may be; 0: bit-equal
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    name: str
    status: Status
    error: float | None = None
    tolerance: float | None = None
    detail: str = ""

    @classmethod
    def within(cls, subject: str, name: str, error: float, tolerance: float, detail: str = "") -> Check:
        """Passed if ``error`` is a number not above ``tolerance``; the detail is kept where it is not."""
        good = error <= tolerance
        return cls(
            subject=subject, name=name, status="ok" if good else "failed", error=_json_safe(error),
            tolerance=tolerance, detail="" if good else detail,
        )  # fmt: skip

    @classmethod
    def holds(cls, subject: str, name: str, true: bool, detail: str) -> Check:
        """Passed if ``true``; otherwise ``detail`` says what was found."""
        return cls(subject=subject, name=name, status="ok" if true else "failed", detail="" if true else detail)

    @classmethod
    def skipped(cls, subject: str, name: str, detail: str) -> Check:
        """Not applicable, with the reason."""
        return cls(subject=subject, name=name, status="skipped", detail=detail)


class VerifyReport(BaseModel):
    """All checks of one model, in the order in which they ran."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    against: Literal["eager", "float64"]
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """At least one check passed and none failed."""
        return not self.failures and any(c.status == "ok" for c in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(c for c in self.checks if c.status == "failed")

    @property
    def headline(self) -> str:
        """The counts in one line."""
        counts = {s: sum(c.status == s for c in self.checks) for s in ("ok", "failed", "skipped")}
        verdict = "VERIFIED" if self.ok else "FAILED" if self.failures else "NOTHING VERIFIED"
        passed = f"{counts['ok']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
        return f"{verdict}: {self.target} against {self.against}: {passed}"

    def renderable(self) -> RenderableType:
        """A table for a rich console: what passed is one row a subject, with the check that came closest to failing."""
        table = Table(title=None, pad_edge=False)
        for column in ("what", "check", "error", "tolerance", "result"):
            table.add_column(column, overflow="fold", justify="right" if column in ("error", "tolerance") else "left")
        for c, names in _folded(self.checks):
            result = Text(f"{c.status} {c.detail}".rstrip(), style=_STYLE[c.status])
            table.add_row(Text(c.subject), Text(names), _number(c.error), _number(c.tolerance), result)
        return Group(table, *(Text(f"note: {n}") for n in self.notes), Text(self.headline, style="bold"))

    def to_text(self, width: int = 140) -> str:
        """The table as plain text."""
        console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, emoji=False)
        with console.capture() as capture:
            console.print(self.renderable(), highlight=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"

    def __str__(self) -> str:
        return self.to_text()

    def to_json(self) -> str:
        """One JSON object; ``inf`` is written as a large number, since JSON has none."""
        return self.model_dump_json(indent=2) + "\n"


def guarded(subject: str, name: str, checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The checks of a step; one that raises is a failed check, and the next steps go on."""
    try:
        yield from checks()
    except Exception as error:
        detail = f"{type(error).__name__}: {errors.first_line(error)}"
        yield Check(subject=subject, name=name, status="failed", detail=detail)


def _json_safe(error: float) -> float:
    return error if math.isfinite(error) else 1e308


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "not a number" if value >= 1e308 else "0" if value == 0 else f"{value:.1e}"


def _folded(checks: Sequence[Check]) -> Iterator[tuple[Check, str]]:
    """Rows of the table: neighbours of one subject that passed are one, with the largest error over tolerance."""
    for (_, status), group in itertools.groupby(checks, key=lambda c: (c.subject, c.status)):
        members = list(group)
        if status != "ok":
            yield from ((c, c.name) for c in members)
            continue
        shown = max(members, key=lambda c: (c.error or 0.0) / c.tolerance if c.tolerance else 0.0)
        yield shown, ", ".join(_shortened([c.name for c in members]))


def _shortened(names: Sequence[str]) -> Iterator[str]:
    """``a: output``, ``a: gradients`` -> ``a: output, gradients``."""
    for head, group in itertools.groupby(names, key=lambda n: n.partition(": ")[0]):
        tails = [n.partition(": ")[2] for n in group]
        yield f"{head} ({', '.join(tails)})" if any(tails) else head
