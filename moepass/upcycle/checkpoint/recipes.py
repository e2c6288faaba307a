"""Recipes against the source: do they fit, what identifies them, and the arithmetic itself."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

import moepass
from moepass import errors
from moepass.upcycle.checkpoint.shards import Shard
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import Computed, OutTensor, Streamed, Verbatim, torch_dtype

#: Inputs up to so many bytes stay with a worker for the next tensor of the group; larger ones come from the system's
#: page cache again.
CACHE_BYTES = 32 << 20
#: Bytes that computations may need together, their results included until they are written; and a guess of what one
#: needs, in bytes per byte of its result (bfloat16 with float32 in between).
ROOM, WORKING = 480 << 20, 2
_FORMAT = 1


def check_recipes(tensors: Sequence[OutTensor], source: Source) -> None:
    """Raise ``BadOutTensor`` where a recipe names what the source lacks, or a copy would change dtype or size."""
    for t in tensors:
        names = (t.recipe.source,) if isinstance(t.recipe, Verbatim) else t.recipe.inputs
        for name in names:
            if name not in source.headers:
                raise errors.BadOutTensor(name=t.name, detail=f"is made from {name!r}, which {source.folder} lacks")
        if isinstance(t.recipe, Verbatim):
            header = source.headers[t.recipe.source]
            if (header.dtype, header.nbytes) != (t.dtype, t.nbytes):
                ours, theirs = f"{t.dtype} {list(t.shape)}", f"{header.dtype} {list(header.shape)}"
                raise errors.BadOutTensor(name=t.name, detail=f"is {ours} and should be the bytes of {theirs}")
        if isinstance(t.recipe, Streamed):
            _check_streamed(t, t.recipe, source)


def _check_streamed(t: OutTensor, recipe: Streamed, source: Source) -> None:
    header = source.headers[recipe.inputs[0]]
    beyond = recipe.rows is not None and recipe.rows[1] > header.shape[0]
    if beyond or header.elements(recipe.rows) != math.prod(t.shape):
        some = "all" if recipe.rows is None else f"rows {recipe.rows[0]}:{recipe.rows[1]}"
        detail = f"is {list(t.shape)} and made from {some} of {header.name}, {list(header.shape)}"
        raise errors.BadOutTensor(name=t.name, detail=detail)


def plan_digests(shards: Sequence[Shard], files: Mapping[str, bytes], source: Source) -> dict[str, str]:
    """What must be equal for a run to continue another, by part of the plan, so that a refusal can name it."""
    tensors = [t for shard in shards for t in shard.tensors]
    layout = [(s.name, s.nbytes, hashlib.sha256(s.header).hexdigest()) for s in shards]
    recipes = [(t.name, _recipe_text(t)) for t in tensors]
    headers = [
        (h.name, h.dtype, h.shape, h.file.name, h.begin, h.end, *source.state[h.file]) for h in source.headers.values()
    ]
    computes = not all(isinstance(t.recipe, Verbatim) for t in tensors)
    return {
        "source": _digest(headers),
        "shards": _digest([_FORMAT, layout]),
        "recipes": _digest(recipes),
        "files": _digest([(name, hashlib.sha256(content).hexdigest()) for name, content in sorted(files.items())]),
        "versions": f"moepass {moepass.__version__}, torch {torch.__version__}" if computes else "any",
    }


def _recipe_text(t: OutTensor) -> list[object]:
    if isinstance(t.recipe, Verbatim):
        return ["verbatim", t.recipe.source]
    kind = "computed" if isinstance(t.recipe, Computed) else "streamed"
    return [kind, list(t.recipe.inputs), t.recipe.digest]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Arithmetic:
    """Computes tensors for the workers, side by side as long as their working memory stays within ``ROOM``.

    A tensor that needs more is computed alone.  Each worker keeps the inputs of its group.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._free = threading.Condition()
        self._used = 0
        self._worker = threading.local()

    @contextmanager
    def computed(self, t: OutTensor, recipe: Computed) -> Iterator[Tensor]:
        """The tensor, contiguous, on the CPU; room for it is taken until the block ends, so that the next one is
        computed while this one is written.

        Raises ``BadOutTensor`` where the function breaks its promise.
        """
        taken = sum(self.source.headers[name].nbytes for name in recipe.inputs) + WORKING * t.nbytes
        self._take(taken)
        try:
            made = self._compute(t, recipe)
            self._give_back(taken - t.nbytes)
            taken = t.nbytes
            yield made
        finally:
            self._give_back(taken)

    @torch.no_grad()
    def _compute(self, t: OutTensor, recipe: Computed) -> Tensor:
        cache = self._cache(t.group)
        inputs = [self._input(cache, name) for name in recipe.inputs]
        versions = [x._version for x in inputs]
        out = recipe.function(*inputs)
        _check_result(t, t.shape, out, inputs, changed=[x._version for x in inputs] != versions)
        _trim(cache, t.group)
        return out.detach().to("cpu").contiguous()

    def _take(self, needed: int) -> None:
        with self._free:
            self._free.wait_for(lambda: self._used == 0 or self._used + needed <= ROOM)
            self._used += needed

    def _give_back(self, room: int) -> None:
        with self._free:
            self._used -= room
            self._free.notify_all()

    def _cache(self, group: str) -> OrderedDict[str, Tensor]:
        """Inputs that this worker has in memory; none of another group."""
        if getattr(self._worker, "group", None) != group or not group:
            self._worker.group, self._worker.cache = group, OrderedDict()
        cache: OrderedDict[str, Tensor] = self._worker.cache
        return cache

    def _input(self, cache: OrderedDict[str, Tensor], name: str) -> Tensor:
        if name not in cache:
            cache[name] = self.source.read(name)
        cache.move_to_end(name)
        return cache[name]


@torch.no_grad()
def streamed(t: OutTensor, recipe: Streamed, source: Source) -> Iterator[Tensor]:
    """The tensor in flat pieces, in order.  Raises ``BadOutTensor`` where a result breaks its promise."""
    step = recipe.begin(source.pieces)
    for piece in source.pieces(recipe.inputs[0], recipe.rows):
        out = step(piece)
        _check_result(t, (piece.numel(),), out, [piece], changed=False)
        yield out.contiguous()


@contextmanager
def one_torch_thread() -> Iterator[Callable[[], None]]:
    """What a worker calls first: its tensors are then computed by one thread, the workers being the parallelism.

    Floating-point sums do not depend on the number of cores then.  The process's own setting is put back at the end.
    """
    before = torch.get_num_threads()
    try:
        yield lambda: torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)


def _trim(cache: OrderedDict[str, Tensor], group: str) -> None:
    """Forget what no later tensor can want, and the oldest of what is too much."""
    while cache and (not group or sum(x.nbytes for x in cache.values()) > CACHE_BYTES):
        cache.popitem(last=False)


def _check_result(t: OutTensor, shape: tuple[int, ...], out: object, inputs: Sequence[Tensor], changed: bool) -> None:
    if not isinstance(out, Tensor):
        raise errors.BadOutTensor(name=t.name, detail=f"came out as {type(out).__name__}, not as a tensor")
    wanted = torch_dtype(t.dtype)
    if out.dtype != wanted or tuple(out.shape) != shape:
        made, planned = f"{out.dtype} {list(out.shape)}", f"{wanted} {list(shape)}"
        raise errors.BadOutTensor(name=t.name, detail=f"came out as {made}, planned as {planned}")
    if changed:
        raise errors.BadOutTensor(name=t.name, detail="was computed by a function that changes its input in place")
    if inputs and not _is_finite(out) and all(_is_finite(x) for x in inputs):
        raise errors.BadOutTensor(name=t.name, detail=f"overflows {wanted}: infinite or NaN from finite inputs")


def _is_finite(x: Tensor) -> bool:
    if not x.numel() or not x.dtype.is_floating_point or x.element_size() == 1:
        return True
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def as_bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, not a copy of it."""
    return x.reshape(-1).view(torch.uint8).numpy().data if x.numel() else memoryview(b"")
