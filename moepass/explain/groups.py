"""Sites with the same plan under one name: ``layers.0.mlp`` ... ``layers.31.mlp`` become ``layers.*.mlp``.

Used by the views only; the report itself keeps every site.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moepass.explain.report import PlanReport, SitePlan, natural_key


@dataclass(frozen=True)
class Group:
    """Sites whose entries are equal in everything but the id.

    ``label``    one name for all of them: the id itself, ``layers.*.mlp`` (all sites of that form are here) or
                 ``layers.{0-2,5}.mlp`` (only these)
    ``ids``      the sites, in natural order
    ``entries``  one per token range, ascending; the ids in them are the first site's
    """

    label: str
    ids: tuple[str, ...]
    entries: tuple[SitePlan, ...]


def group(report: PlanReport) -> tuple[Group, ...]:
    """The report's sites, grouped; in the natural order of each group's first site."""
    entries: dict[str, list[SitePlan]] = {}
    for site in report.sites:
        for name in site.ids:
            entries.setdefault(name, []).append(site.model_copy(update={"id": "", "shared_by": ()}))
    alike: dict[tuple[str, tuple[SitePlan, ...]], list[str]] = {}
    for name in sorted(entries, key=natural_key):
        alike.setdefault((_pattern(name), tuple(entries[name])), []).append(name)
    groups = []
    for (_, plans), names in alike.items():
        groups.append(
            Group(
                label=labels(names, entries)[0],
                ids=tuple(names),
                entries=tuple(p.model_copy(update={"id": names[0]}) for p in plans),
            )
        )
    return tuple(groups)


def labels(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Names of one form joined to one label each, as in ``group``; ``among``: every name that could be meant."""
    everyone = set(among)
    alike: dict[str, list[str]] = {}
    for name in sorted(names, key=natural_key):
        alike.setdefault(_pattern(name), []).append(name)
    return [
        _label(found, sum(_pattern(n) == pattern for n in everyone) == len(found)) for pattern, found in alike.items()
    ]


def _parts(name: str) -> list[str]:
    return name.split(".")


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _pattern(name: str) -> str:
    return ".".join("*" if _is_index(p) else p for p in _parts(name))


def _label(names: list[str], complete: bool) -> str:
    columns = list(zip(*map(_parts, names), strict=True))
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    label = [column[0] for column in columns]
    for i in varying:
        spelled_out = len(varying) == 1 and not complete
        label[i] = "{" + _runs([int(p) for p in columns[i]]) + "}" if spelled_out else "*"
    return ".".join(label)


def _runs(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2,5``."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ",".join("-".join(map(str, run)) for run in runs)
