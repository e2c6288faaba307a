"""A graph before and after, as text to read: tidied source, and the places where the two differ.

The source is fx's own (``print_readable``) without what only a machine wants: folders of this machine, frees of
variables, and the mangled form of parameter names.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

#: Unchanged lines shown around a change.
CONTEXT = 2

_FOLDER = re.compile(r"(# File: )(?:\S*/site-packages/|(?:\S*/)(?=[^/\s]+:\d))")
_FREED = re.compile(r";  (?:\w+ = )+None(?=\s*(?:#.*)?$)", re.MULTILINE)
_PARAMETER = re.compile(r"\b[lL]_((?:self_|fn_)?(?:_?modules_\w+?)?_?(?:parameters|buffers)_\w+?)_?(?=\b[^\w]|$)")
_SIGNATURE = re.compile(r"^( *)def forward\(self, (.*)\)(.*):$", re.MULTILINE)
_NEXT_ARGUMENT = re.compile(r", (?=[A-Za-z_][\w.]*(?::|$))")
_SAME = re.compile(r"^ *([\w.]+) = ([\w.]+)$")
_NO_TRACE = "# No stacktrace found for following nodes"


def tidy(source: str) -> str:
    """The source of a graph in its readable form: an argument a line, parameters by the names the model gives them."""
    text = _FREED.sub("", _FOLDER.sub(r"\1", source)).replace(_NO_TRACE, "")
    text = _PARAMETER.sub(lambda match: _plain(match[1]), text)
    text = _SIGNATURE.sub(_arguments, text)
    return "\n".join(line for line in text.split("\n") if not _renames(line))


def _plain(name: str) -> str:
    """``self_modules_layers_modules_0_parameters_weight`` -> ``self.layers.0.weight``."""
    return re.sub(r"_?(?:modules|parameters|buffers)_", ".", name).strip("._")


def _arguments(match: re.Match[str]) -> str:
    indent, given, result = match.groups()
    lines = "".join(f"{indent}        {one},\n" for one in _NEXT_ARGUMENT.split(given))
    return f"{indent}def forward(\n{indent}        self,\n{lines}{indent}){result}:"


def _renames(line: str) -> bool:
    """Whether a line only gives an input its own name."""
    found = _SAME.match(line)
    return found is not None and found[1].lower() == found[2].lower()


@dataclass(frozen=True)
class Change:
    """One place where two graphs differ: lines with their kind, ``-``, ``+`` or a blank."""

    lines: tuple[tuple[str, str], ...]

    @property
    def size(self) -> tuple[int, int]:
        """Lines that go, and lines that come."""
        kinds = [kind for kind, _ in self.lines]
        return kinds.count("-"), kinds.count("+")


def changes(before: str, after: str) -> tuple[Change, ...]:
    """Where ``after`` differs, in order; blank lines do not count."""
    old, new = ([line for line in text.splitlines() if line.strip()] for text in (before, after))
    found: list[list[tuple[str, str]]] = []
    for line in list(difflib.unified_diff(old, new, n=CONTEXT, lineterm=""))[2:]:
        if line.startswith("@@"):
            found.append([])
        else:
            found[-1].append((line[0], line[1:]))
    return tuple(Change(tuple(lines)) for lines in found)
