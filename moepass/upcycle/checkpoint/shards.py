"""Which tensor goes into which file at which byte: a pure function, known before the first write.

Contract
    in    tensors in the order in which they are wanted, the largest size of a file in bytes
    out   ``Shard``s: name, the exact header bytes, tensors in the order of their bytes; index.json as bytes
    A file is larger than the limit only when a single tensor is.  Inside a file wide elements come first (stable), so
    that every tensor is aligned to its element; the data begin at a multiple of 4096 bytes (the header is padded with
    spaces, which the format allows), so that file systems that share blocks can.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from moepass import errors
from moepass.upcycle.checkpoint.tensors import DTYPES, OutTensor

#: As ``save_pretrained`` before transformers 5; small enough to move, large enough to stream.
MAX_SHARD_SIZE = 5_000_000_000
ALIGNMENT = 4096


@dataclass(frozen=True)
class Shard:
    """One file.  ``header`` includes the 8 bytes of its length; ``tensors[i]`` begins at byte ``offsets[i]``."""

    name: str
    header: bytes
    tensors: tuple[OutTensor, ...]
    offsets: tuple[int, ...]
    nbytes: int


def plan_shards(
    tensors: Sequence[OutTensor], max_shard_size: int = MAX_SHARD_SIZE, stem: str = "model"
) -> tuple[Shard, ...]:
    """Files for ``tensors``, filled in order; names begin with ``stem``.  Raises ``BadOutTensor``, ``BadOption``."""
    if isinstance(max_shard_size, bool) or not isinstance(max_shard_size, int) or max_shard_size < 1:
        raise errors.BadOption(
            name="max_shard_size", value=max_shard_size, detail="give a number of bytes of at least 1"
        )
    if not tensors:
        raise errors.BadOption(name="tensors", value=(), detail="there is nothing to write")
    _check(tensors)
    parts = _fill(tensors, max_shard_size)
    total = len(parts)
    if total == 1:
        return (_shard(f"{stem}.safetensors", parts[0]),)
    return tuple(_shard(f"{stem}-{i:05d}-of-{total:05d}.safetensors", part) for i, part in enumerate(parts, 1))


def index_name(shards: Sequence[Shard]) -> str:
    """``model.safetensors.index.json``, or with their stem."""
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", ".safetensors.index.json", shards[0].name)


def index_json(shards: Sequence[Shard]) -> bytes:
    """The index: where each tensor is, sizes and parameters in ``metadata``."""
    size = sum(t.nbytes for shard in shards for t in shard.tensors)
    parameters = sum(t.nbytes // DTYPES[t.dtype][0] for shard in shards for t in shard.tensors)
    weight_map = {t.name: shard.name for shard in shards for t in shard.tensors}
    metadata = {"total_parameters": parameters, "total_size": size}
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def _check(tensors: Sequence[OutTensor]) -> None:
    seen: set[str] = set()
    for t in tensors:
        if not t.name or t.name == "__metadata__":
            raise errors.BadOutTensor(name=t.name, detail="has a name that the format reserves")
        if t.name in seen:
            raise errors.BadOutTensor(name=t.name, detail="is planned twice")
        if t.dtype not in DTYPES:
            raise errors.BadOutTensor(name=t.name, detail=f"has the unknown dtype {t.dtype!r}")
        if any(type(n) is not int or n < 0 for n in t.shape):
            raise errors.BadOutTensor(name=t.name, detail=f"has the impossible shape {t.shape}")
        seen.add(t.name)


def _fill(tensors: Sequence[OutTensor], limit: int) -> list[list[OutTensor]]:
    parts: list[list[OutTensor]] = []
    data, entries = 0, 0
    for t in tensors:
        entry = _entry_bound(t)
        if not parts or _file_bound(data + t.nbytes, entries + entry) > limit:
            parts.append([])
            data = entries = 0
        parts[-1].append(t)
        data, entries = data + t.nbytes, entries + entry
    return parts


def _entry_bound(t: OutTensor) -> int:
    """No entry of this tensor in a header is longer: offsets have at most 19 digits."""
    return len(_dumps({t.name: _entry(t, 10**18, 10**18)}))


def _file_bound(data: int, entries: int) -> int:
    return data + _aligned(8 + entries + len(_dumps({"__metadata__": {"format": "pt"}})))


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _dumps(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _entry(t: OutTensor, begin: int, end: int) -> dict[str, object]:
    return {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [begin, end]}


def _shard(name: str, tensors: Sequence[OutTensor]) -> Shard:
    ordered = sorted(tensors, key=lambda t: -DTYPES[t.dtype][0])
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, position = [], 0
    for t in ordered:
        begins.append(position)
        content[t.name] = _entry(t, position, position + t.nbytes)
        position += t.nbytes
    text = _dumps(content)
    text = text.ljust(_aligned(8 + len(text)) - 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = tuple(len(header) + begin for begin in begins)
    return Shard(name, header, tuple(ordered), offsets, len(header) + position)
