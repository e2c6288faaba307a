"""Tuning tables: tiles that a run on the hardware found faster than the rule (``schedule.tiles``).

``kernels/tuning/<target>.json`` holds a ``Table``.  An entry is for one pair of matrices, one dtype and one bucket of
rows per expert (a power of two, rounded up); T and E beyond that make no difference to a tile.  A table is written by
``python -m benchmarks.gpu_moe --tune`` on the hardware that it names, and by nothing else.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from moepass.frozen import Frozen
from moepass.kernels.fused.problem import Problem, Tile, Tiles

log = logging.getLogger(__name__)


class Entry(Frozen):
    """Tiles by kernel (fields of ``Tiles``); kernels without one keep the rule's.  ``rows``: the bucket's upper end."""

    D: int = Field(ge=1)
    F: int = Field(ge=1)
    n: int = Field(ge=1, le=2)
    dtype: str
    rows: int = Field(ge=1)
    tiles: dict[str, Tile]


class Table(Frozen):
    """What was tuned on one machine: its accelerator and versions, and the entries."""

    target: str
    accelerator: str
    versions: dict[str, str]
    entries: tuple[Entry, ...]


def bucket(problem: Problem) -> int:
    """Rows per expert, rounded up to a power of two."""
    return 1 << max(0, math.ceil(math.log2(max(1.0, problem.rows_per_expert))))


def key(problem: Problem) -> tuple[int, int, int, str, int]:
    """What an entry is for."""
    return problem.D, problem.F, problem.n, problem.dtype, bucket(problem)


def tuned(problem: Problem, target: str, rule: Tiles) -> Tiles:
    """The rule's tiles, with those of the target's table in their places."""
    return rule._replace(**_entries(target, str(folder())).get(key(problem), {}))


def folder() -> Path:
    """Where the tables are."""
    return Path(str(resources.files("moepass.kernels"))) / "tuning"


def merged(old: Table | None, new: Table) -> Table:
    """``new``, with the old entries that it does not replace; tables of another target have none."""
    kept = old.entries if old is not None and old.target == new.target else ()
    entries = {_key_of(e): e for e in (*kept, *new.entries)}
    return new.model_copy(update={"entries": tuple(entries[k] for k in sorted(entries))})


def read(path: Path) -> Table | None:
    """A table, or None where there is none; a damaged one is named and ignored: the rule serves."""
    if not path.is_file():
        return None
    try:
        return Table.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        log.warning("ignoring the tuning table %s: %s", path, str(error).partition("\n")[0])
        return None


def reload() -> None:
    """Read the tables again when they are next asked for."""
    _entries.cache_clear()


def check(tile: Tile) -> None:
    """Raise ``ValueError`` where no kernel could have such a tile: sizes are powers of two from 16, warps 1 to 16."""
    sizes = (tile.m, tile.n, tile.k)
    good = all(s >= 16 and s & (s - 1) == 0 for s in sizes) and tile.warps in (1, 2, 4, 8, 16)
    if not good or tile.stages < 1 or tile.group < 1 or tile.persistent < 0 or tile.tma not in (0, 1, 2):
        raise ValueError(f"{tile} is no tile: sizes are powers of two from 16, warps a power of two up to 16")


@functools.lru_cache(maxsize=32)
def _entries(target: str, where: str) -> dict[tuple[Any, ...], dict[str, Tile]]:
    table = read(Path(where) / f"{target}.json")
    return {} if table is None else _checked(table.entries, target)


def _checked(entries: Iterable[Entry], target: str) -> dict[tuple[Any, ...], dict[str, Tile]]:
    found = {}
    for entry in entries:
        try:
            _check_entry(entry)
        except ValueError as error:
            log.warning("ignoring an entry of the tuning table of %s: %s", target, error)
            continue
        found[_key_of(entry)] = entry.tiles
    return found


def _check_entry(entry: Entry) -> None:
    unknown = sorted(set(entry.tiles) - set(Tiles._fields))
    if unknown:
        raise ValueError(f"there is no kernel {unknown[0]!r}")
    for tile in entry.tiles.values():
        check(tile)
    if "dw" in entry.tiles and (entry.tiles["dw"].persistent or entry.tiles["dw"].tma):
        raise ValueError("dw has no persistent form, and none with descriptors")
    if any(tile.weigh for name, tile in entry.tiles.items() if name != "down"):
        raise ValueError("only down can weigh rows")
    for first, second in (("up", "down"), ("hidden", "dx")):  # they share the row tiles
        if (first in entry.tiles) != (second in entry.tiles):
            raise ValueError(f"{first} and {second} share their row tiles: give both or neither")
        if first in entry.tiles and entry.tiles[first].m != entry.tiles[second].m:
            raise ValueError(f"{first} and {second} share their row tiles: m differs")


def _key_of(entry: Entry) -> tuple[int, int, int, str, int]:
    return entry.D, entry.F, entry.n, entry.dtype, entry.rows
