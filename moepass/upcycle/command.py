"""``moepass.upcycle_checkpoint``: a dense Hugging Face folder becomes a MoE folder that stock transformers load.

Stages
    prepare  open the source (headers only), find the host, check recipe and layers, plan every tensor and file; every
             refusal comes from here, before anything is written
    write    stream it (``checkpoint.writer``): journal, partial files, rename; resumable
    verify   if asked: both folders layer by layer, on the same tokens (``checkpoint.verify``)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepass import errors
from moepass.upcycle.checkpoint.shards import MAX_SHARD_SIZE, Shard, plan_shards
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import FLOATS, OutTensor
from moepass.upcycle.checkpoint.writer import WORKERS, Progress, WriteReport, check, write
from moepass.upcycle.hf import card
from moepass.upcycle.hf.config import config_bytes, host_config
from moepass.upcycle.hf.files import small_files
from moepass.upcycle.hf.hosts import HOSTS, Shape
from moepass.upcycle.hf.match import Match, match
from moepass.upcycle.hf.recipe import Plan, Recipe, plan, rounding
from moepass.upcycle.hf.sizes import Sizes, measure
from moepass.upcycle.hf.tensors import block_name, check_names, out_tensors
from moepass.upcycle.modules import glob_list, matches_any
from moepass.upcycle.own import schema as own

if TYPE_CHECKING:
    from moepass.upcycle.checkpoint.verify import VerifyReport

#: ``dtype=`` -> code of safetensors.
DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class UpcycleReport:
    """What was planned, written and checked.

    ``content``  as in ``moepass_upcycle.json``: recipe, verdict, warnings, sizes, versions, origin of every tensor
    ``written``  None after a dry run; ``verified``: None unless asked for
    """

    folder: Path
    facts: card.Facts
    content: dict[str, Any]
    written: WriteReport | None = None
    verified: VerifyReport | None = None

    @property
    def exact(self) -> bool:
        """Whether the output should compute the dense function at step 0."""
        return self.facts.exact

    @property
    def sizes(self) -> Sizes:
        """Parameters, FLOPs, bytes."""
        return self.facts.sizes

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences for the user."""
        return self.facts.warnings

    @property
    def broken(self) -> bool:
        """Whether it was verified, should be exact, and is not."""
        return self.exact and self.verified is not None and not self.verified.passed

    def to_json(self) -> str:
        """The report without the origin of every tensor, and with the result of the comparison."""
        content = {key: value for key, value in self.content.items() if key != "tensors"}
        content["verified"] = None if self.verified is None else json.loads(self.verified.to_json())
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    def __str__(self) -> str:
        return card.text(self.facts)


@dataclass(frozen=True)
class _Job:
    """Everything that a run needs, planned and checked."""

    source: Source
    tensors: list[OutTensor]
    files: dict[str, bytes]
    shards: tuple[Shard, ...]
    report: UpcycleReport


def upcycle_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str | None = None,
    init: str = "copy",
    experts: int = 8,
    top_k: int = 2,
    granularity: int = 2,
    noise_std: float = 0.05,
    drop_ratio: float = 0.5,
    router: str = "orthogonal",
    router_std: float = 0.1,
    renormalize: bool = True,
    layers: str | Sequence[str] = "*",
    dtype: str | None = None,
    seed: int = 0,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    resume: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    workers: int = WORKERS,
    progress: Callable[[Progress], None] | None = None,
) -> UpcycleReport:
    """Upcycle the checkpoint in ``src`` into the new folder ``dst``, tensor by tensor; the model is never in memory.

    ``to``           MoE ``model_type``; None: the default host of the family; ``moepass``: our own format, for models
                     without a host (``moepass.load`` reads it)
    ``init``         ``copy``, ``virtual-groups``, ``noise``, ``drop`` or ``split``; see ``hf.recipe.Recipe`` for these
                     and ``experts`` ... ``renormalize``
    ``layers``       globs over ``model.layers.N.mlp``; the others stay dense, where the host can have both
    ``dtype``        ``float32``, ``bfloat16`` or ``float16`` for all weights; None keeps each tensor's own
    ``max_shard_size``  bytes, or text such as ``5GB``
    ``resume``       continue an interrupted run of the same command; the bytes are those of an uninterrupted one
    ``dry_run``      plan and check only; nothing is written
    ``verify``       compare the two functions afterwards, in float32; the result is in the report
    The bytes depend on source, options and versions alone.  SRC is never written to.
    Raises ``BadCheckpoint``, ``NoHost``, ``HostRefuses``, ``UnexpectedTensor``, ``BadOption``, ``NotDivisible``,
    ``TopKTooLarge``, ``BadDestination``, ``MissingPackage``: each before anything is written, except a disk that fills.
    """
    recipe = Recipe(
        method=init,
        experts=experts,
        top_k=top_k,
        granularity=granularity,
        noise_std=noise_std,
        drop_ratio=drop_ratio,
        router=router,
        router_std=router_std,
        renormalize=renormalize,
        seed=seed,
    )
    size = parse_size(max_shard_size)
    job = _prepare(Path(src), Path(dst), recipe, to, glob_list(layers), dtype, size, resume, dry_run)
    if dry_run:
        return job.report
    options: dict[str, Any] = {"max_shard_size": size, "resume": resume, "stem": _stem(to)}
    written = write(dst, job.tensors, job.source, job.files, workers=workers, progress=progress, **options)
    report = replace(job.report, written=written)
    if not verify:
        return report
    from moepass.upcycle.checkpoint.verify import verify as compare

    return replace(report, verified=compare(src, dst))


def parse_size(size: int | str) -> int:
    """Bytes: ``5GB`` is 5e9, ``5GiB`` is 5 * 2**30.  Raises ``BadOption``."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]i?[bB])?\s*", str(size))
    unit = (found[2] or "").upper() if found else ""
    if found is None or unit not in _UNITS:
        raise errors.BadOption(name="max_shard_size", value=size, detail="give bytes, or a size such as 500MB or 5GB")
    return int(float(found[1]) * _UNITS[unit])


def _prepare(
    src: Path,
    dst: Path,
    recipe: Recipe,
    to: str | None,
    patterns: Sequence[str],
    dtype: str | None,
    max_shard_size: int,
    resume: bool,
    dry_run: bool,
) -> _Job:
    code = _dtype_code(dtype)
    source = Source.open(src)
    if to == own.NAME:
        return _prepare_own(source, dst, recipe, patterns, dtype, max_shard_size, resume, dry_run)
    found = match(source.config, to)
    planned = plan(recipe, found.host, found.config.intermediate_size)
    shape = _shape(found, planned, _chosen(found, patterns))
    config = host_config(found, shape, dtype)
    tensors = out_tensors(source, found, planned, shape, code)
    check_names(tensors, config.config, shape.layers, src)
    small, left_out = small_files(src)
    warnings = (*planned.warnings, *config.warnings, *left_out, *_about_shared(found))
    small["config.json"] = config_bytes(config.json)
    shards, no_room = _check(dst, tensors, source, small, max_shard_size, resume, dry_run, to)
    warnings += no_room
    sizes = measure(
        tensors,
        source.headers,
        [(s.name, s.nbytes) for s in shards],
        names=found.host.names,
        experts=recipe.experts,
        top_k=recipe.top_k,
        tied=bool(found.config.tie_word_embeddings),
    )
    floating = [h.dtype for h in source.headers.values() if h.dtype in FLOATS]
    expert = next(t.dtype for t in tensors if ".experts." in t.name or "linear.weight" in t.name)
    rounded = rounding(planned, floating, expert, code)
    facts = card.Facts(source, found, planned, sizes, shape.layers, dtype, warnings, rounded)
    content = card.report(facts, tensors)
    small[card.REPORT] = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    small["README.md"] = card.readme(_old_card(src), facts).encode()
    return _Job(source, tensors, small, shards, UpcycleReport(dst, facts, content))


def _check(
    dst: Path,
    tensors: list[OutTensor],
    source: Source,
    files: dict[str, bytes],
    max_shard_size: int,
    resume: bool,
    dry_run: bool,
    to: str | None,
) -> tuple[tuple[Shard, ...], tuple[str, ...]]:
    """The writer's checks; a disk that is too small is only a warning to somebody who does not write to it yet."""
    try:
        options: dict[str, Any] = {"max_shard_size": max_shard_size, "resume": resume, "stem": _stem(to)}
        return check(dst, tensors, source, files, **options), ()
    except errors.BadDestination as error:
        if not dry_run or error.fields["reason"] != "no_space":
            raise
        return plan_shards(tensors, max_shard_size, _stem(to)), (str(error),)


def _stem(to: str | None) -> str:
    """How the names of the files with weights begin: no stock loader may find those of our own format."""
    return own.STEM if to == own.NAME else "model"


def _prepare_own(
    source: Source,
    dst: Path,
    recipe: Recipe,
    patterns: Sequence[str],
    dtype: str | None,
    max_shard_size: int,
    resume: bool,
    dry_run: bool,
) -> _Job:
    """As ``_prepare``, for ``--to moepass``."""
    from moepass.upcycle.own.plan import draft  # it traces models, which needs most of moepass

    code = _dtype_code(dtype)
    made = draft(source, recipe, patterns, code)
    small, left_out = small_files(source.folder)
    small |= made.files
    shards, no_room = _check(dst, made.tensors, source, small, max_shard_size, resume, dry_run, own.NAME)
    sizes = made.sizes([(s.name, s.nbytes) for s in shards])
    floating = [h.dtype for h in source.headers.values() if h.dtype in FLOATS]
    rounded = rounding(made.plan, floating, made.expert_code, code)
    notes = (*made.plan.warnings, *made.warnings, *left_out, *no_room)
    facts = card.Facts(source, made.found, made.plan, sizes, made.layers, dtype, notes, rounded)
    content = card.report(facts, made.tensors)
    small[card.REPORT] = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    small["README.md"] = card.readme(_old_card(source.folder), facts).encode()
    return _Job(source, made.tensors, small, shards, UpcycleReport(dst, facts, content))


def _shape(found: Match, planned: Plan, layers: tuple[int, ...]) -> Shape:
    """Raises ``BadOption`` where the host cannot leave these layers dense."""
    recipe, config = planned.recipe, found.config
    shape = Shape(
        experts=recipe.experts,
        top_k=recipe.top_k,
        width=config.intermediate_size // planned.cut,
        renormalize=recipe.renormalize,
        layers=layers,
        num_layers=config.num_hidden_layers,
        config=config,
        features=found.features,
    )
    if shape.all_layers or (found.host.mixed is not None and found.host.mixed(shape)):
        return shape
    able = [name for name in found.family.hosts if (mixed := HOSTS[name].mixed) is not None and mixed(shape)]
    fitting = [name for name in able if {f.name for f in found.features} <= HOSTS[name].supports]
    other = f"use --to {fitting[0]}" if fitting else "convert all layers"
    detail = f"{found.host.model_type} cannot leave the layers {shape.dense_layers} dense; {other}"
    raise errors.BadOption(name="layers", value=list(layers), detail=detail)


def _chosen(found: Match, patterns: Sequence[str]) -> tuple[int, ...]:
    names = [block_name(i) for i in range(found.config.num_hidden_layers)]
    chosen = tuple(i for i, name in enumerate(names) if matches_any([name], patterns))
    if not chosen:
        detail = f"it selects none of {names[0]} to {names[-1]}" if names else "the model has no layers"
        raise errors.BadOption(name="layers", value=",".join(patterns), detail=detail)
    return chosen


def _dtype_code(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    if dtype not in DTYPE_CODES:
        raise errors.BadOption(name="dtype", value=dtype, detail=f"choose one of {', '.join(DTYPE_CODES)}")
    return DTYPE_CODES[dtype]


def _about_shared(found: Match) -> list[str]:
    if not found.host.zero_shared:
        return []
    return [f"{found.host.model_type} always has a shared expert: it starts at zero and costs as much as an expert"]


def _old_card(src: Path) -> str | None:
    path = src / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
