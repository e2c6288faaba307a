"""Text for a recipe to look at: what the dense blocks see and do on it.

Contract
    in    a text file, tokenised by the source's own tokenizer, or token ids; the source's config
    out   ``Calibration``: at most ``TOKENS`` ids in rows of at most ``ROW``, padded on the right
          ``observed`` runs them through the dense model, one layer in memory at a time
    Bounded in memory and time, and deterministic: the forward runs in one thread, whose sums no setting changes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepass import errors
from moepass.upcycle.checkpoint.observe import observe
from moepass.upcycle.hf.tokenizer import tokenizer_of

#: Tokens that are used at most, and in one row; characters of a text that are read for them.
TOKENS, ROW, _CHARACTERS = 4096, 512, 1 << 18

#: Ids as Python gives them, as the command line does (``1,2,3``), or a .json file with a list of lists.
Ids = str | os.PathLike[str] | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Calibration:
    """``ids [B, S]``, padded on the right with 0 where ``mask [B, S]`` is False; ``origin``: "text" or "ids"."""

    ids: Tensor
    mask: Tensor
    origin: str

    @property
    def tokens(self) -> int:
        """How many, without padding."""
        return int(self.mask.sum())

    def to_dict(self) -> dict[str, Any]:
        """For the report: identifies the ids, not the file."""
        content = self.ids.numpy().tobytes() + self.mask.numpy().tobytes()
        shape = list(self.ids.shape)
        return {
            "from": self.origin,
            "tokens": self.tokens,
            "sha256": hashlib.sha256(content + str(shape).encode()).hexdigest(),
        }


@dataclass(frozen=True)
class Observed:
    """A block on T tokens, float32: its inputs ``x_TD`` and what its output projection gets, ``a_TF``."""

    x_TD: Tensor
    a_TF: Tensor


def calibration(
    src: Path, config: Any, text: str | os.PathLike[str] | None = None, ids: Ids | None = None
) -> Calibration | None:
    """``text``: path of a file in UTF-8; ``ids``: see ``Ids``.  None without either.  Raises ``BadOption``."""
    if text is not None and ids is not None:
        raise errors.BadOption(name="calibration_tokens", value=ids, detail="give this or a text, not both")
    if text is None and ids is None:
        return None
    name, value = ("calibration", text) if ids is None else ("calibration_tokens", ids)
    rows = [_tokenised(src, Path(text))] if text is not None else _rows(ids)
    vocabulary = int(config.vocab_size)
    wrong = next((i for row in rows for i in row if not 0 <= i < vocabulary), None)
    if wrong is not None:
        detail = f"the id {wrong} is outside the vocabulary, which is 0 to {vocabulary - 1}"
        raise errors.BadOption(name=name, value=value, detail=detail)
    if not any(rows):
        raise errors.BadOption(name=name, value=value, detail="it has no tokens; give some hundred or more")
    length = min(ROW, int(getattr(config, "max_position_embeddings", None) or ROW))
    return _padded(_bounded(rows, length), "text" if ids is None else "ids")


def observed(src: Path, given: Calibration, layers: Sequence[int], see: Callable[[int, Observed], None]) -> None:
    """Call ``see`` with what each of ``layers`` saw; nothing after the last of them runs.  Raises as ``observe``."""
    wanted, last = set(layers), max(layers)

    def keep(layer: int, x_BSD: Tensor, a_BSF: Tensor) -> None:
        if layer in wanted:
            see(layer, Observed(x_BSD[given.mask], a_BSF[given.mask]))
        if layer == last:
            raise _Enough

    with single_threaded(), suppress(_Enough):
        observe(src, given.ids, keep)


@contextmanager
def single_threaded() -> Iterator[None]:
    """One torch thread inside, so that no sum depends on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Enough(Exception):
    """All layers that matter were seen."""


def _tokenised(src: Path, path: Path) -> list[int]:
    try:
        with path.open(encoding="utf-8") as file:
            content = file.read(_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        detail = f"it cannot be read as UTF-8 text ({' '.join(str(error).split())})"
        raise errors.BadOption(name="calibration", value=str(path), detail=detail) from None
    if not content.strip():
        return []
    tokenizer = tokenizer_of(src, "calibration", str(path), "give token ids with --calibration-tokens")
    return [int(i) for i in tokenizer(content, verbose=False).input_ids]


def _rows(ids: Any) -> list[list[int]]:
    """Token ids as lists.  Raises ``BadOption`` for anything else."""
    try:
        return _checked(_parsed(ids))
    except (OSError, TypeError, ValueError) as error:
        detail = f"give ids such as 1,15043,3186, or a .json file with a list of lists of them ({error})"
        raise errors.BadOption(name="calibration_tokens", value=ids, detail=detail) from None


def _parsed(ids: Any) -> Any:
    if isinstance(ids, os.PathLike) or (isinstance(ids, str) and ids.endswith(".json")):
        return json.loads(Path(ids).read_text(encoding="utf-8"))
    return [int(part) for part in ids.split(",")] if isinstance(ids, str) else ids


def _checked(ids: Any) -> list[list[int]]:
    rows = [list(row) if isinstance(row, list | tuple) else row for row in ids]
    if not any(isinstance(row, list) for row in rows):
        rows = [rows]
    for row in rows:
        for i in row:
            if isinstance(i, bool) or not isinstance(i, int):
                raise TypeError(f"{i!r} is not an id")
    return rows


def _bounded(rows: Sequence[Sequence[int]], length: int) -> list[Sequence[int]]:
    """The first ``TOKENS`` ids, long rows cut into rows of this length."""
    kept, left = [], TOKENS
    for row in rows:
        for begin in range(0, len(row), length):
            part = row[begin : begin + min(length, left)]
            left -= len(part)
            if part:
                kept.append(part)
    return kept


def _padded(rows: Sequence[Sequence[int]], origin: str) -> Calibration:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row)
        mask[b, : len(row)] = True
    return Calibration(ids, mask, origin)
