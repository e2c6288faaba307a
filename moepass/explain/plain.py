"""Text for files and pipes: what rich would show, without colours and without control characters."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def plain(*parts: RenderableType, width: int, separator: str = " ") -> str:
    """What rich would show, as plain lines of at most ``width`` characters, trailing newline."""
    console = Console(
        file=io.StringIO(), width=width, color_system=None, force_terminal=False, force_jupyter=False, emoji=False
    )
    with console.capture() as capture:
        console.print(*parts, sep=separator, highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def printable(text: str) -> str:
    """Without control characters, which could reach a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
