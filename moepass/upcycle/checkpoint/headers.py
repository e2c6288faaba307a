"""Headers of safetensors files: an 8-byte little-endian length, that many bytes of JSON, then the data without holes.

``read_headers`` checks everything that the format promises before anybody uses an offset.  The library ``safetensors``
does not tell byte ranges, hence this reader; the tests hold it against the library.
Source: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any, NoReturn

from moepass import errors
from moepass.upcycle.checkpoint.tensors import DTYPES, Header

#: The format's own limit.
MAX_HEADER = 100_000_000
_AGAIN = "download or save the checkpoint again"


def bad(path: Path, reason: str, detail: str, remedy: str = _AGAIN) -> NoReturn:
    """Raise ``BadCheckpoint``."""
    raise errors.BadCheckpoint(path=path, reason=reason, detail=detail, remedy=remedy)


def read_headers(path: Path) -> list[Header]:
    """Tensors of one file in the order of their bytes.  Raises ``BadCheckpoint`` for anything the format forbids."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            bad(path, "not_a_file", "it is not a regular file")
        with path.open("rb") as file:
            length = _header_length(path, file.read(8), status.st_size)
            text = file.read(length)
    except OSError as e:
        bad(path, "unreadable", f"{e.strerror}", "check that the file is there and readable")
    if len(text) != length:
        bad(path, "truncated", f"the header should have {length} bytes, the file ends after {len(text)}")
    entries = _parse(path, text)
    headers = [_header(path, name, entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"]
    headers.sort(key=lambda h: (h.begin, h.end))
    _check_ranges(path, headers, 8 + length, status.st_size)
    return headers


def _header_length(path: Path, first: bytes, size: int) -> int:
    if len(first) < 8:
        bad(path, "truncated", f"the file has {size} bytes")
    if first == b"version ":
        bad(path, "git_lfs", "it is a pointer of Git LFS, not the data", "run `git lfs pull` in the source folder")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER:
        bad(path, "header_length", f"the header claims {length} bytes, more than the format allows")
    if length > size - 8:
        bad(path, "truncated", f"the header claims {length} bytes, the file has {size}")
    return length


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice = next(key for key in made if sum(k == key for k, _ in pairs) > 1)
            bad(path, "duplicate", f"the header names {twice!r} twice")
        return made

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        if isinstance(e, errors.BadCheckpoint):
            raise
        bad(path, "header_json", f"the header is not JSON ({e})")
    if not isinstance(entries, dict):
        bad(path, "header_json", "the header is not a JSON object")
    return entries


def _header(path: Path, name: str, entry: Any, data: int) -> Header:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        bad(path, "header_json", f"the entry of {name!r} is not {{dtype, shape, data_offsets}}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        bad(path, "dtype", f"{name!r} has the unknown dtype {dtype!r}", f"convert it to one of {known}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        bad(path, "header_json", f"{name!r} has shape {shape!r} and offsets {offsets!r}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype][0]
    if end - begin != needed:
        bad(path, "size", f"{name!r} of {dtype} {shape} needs {needed} bytes, its offsets span {end - begin}")
    return Header(name, dtype, tuple(shape), path, data + begin, data + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_ranges(path: Path, headers: list[Header], data: int, size: int) -> None:
    """No overlap, no hole, nothing behind the end, nothing left over."""
    position = data
    for h in headers:
        if h.begin < position:
            bad(path, "overlap", f"{h.name!r} begins at byte {h.begin}, inside the tensor before it")
        if h.begin > position:
            bad(path, "hole", f"{h.begin - position} bytes before {h.name!r} belong to no tensor")
        position = h.end
    if position > size:
        bad(path, "truncated", f"the tensors need {position} bytes, the file has {size}")
    if position < size:
        bad(path, "trailing", f"{size - position} bytes at the end belong to no tensor")
