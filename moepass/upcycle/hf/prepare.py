"""Everything that ``moepass upcycle`` decides and checks before it writes.

Contract
    in    SRC, DST, what the user asks for
    out   ``Job``: tensors with their recipes, small files, shards, facts for the report
    Every refusal comes from here.  What takes time (clustering, prompts, measuring) comes after all that is quick to
    refuse; nothing is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moepass import errors
from moepass.upcycle.checkpoint.destination import check_folders
from moepass.upcycle.checkpoint.shards import Shard, plan_shards
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import FLOATS, OutTensor
from moepass.upcycle.checkpoint.writer import check
from moepass.upcycle.hf import card
from moepass.upcycle.hf.arrange import arrange, check_calibration
from moepass.upcycle.hf.block import Extras
from moepass.upcycle.hf.calibration import Calibration, Ids
from moepass.upcycle.hf.calibration import calibration as read_calibration
from moepass.upcycle.hf.config import config_bytes, host_config
from moepass.upcycle.hf.files import small_files
from moepass.upcycle.hf.hosts import HOSTS, Shape
from moepass.upcycle.hf.match import Match, match
from moepass.upcycle.hf.methods import uses_calibration
from moepass.upcycle.hf.parents import Parents, about, open_parents
from moepass.upcycle.hf.pieces import block_name
from moepass.upcycle.hf.prompts import Given, router_for
from moepass.upcycle.hf.recipe import Plan, Recipe, plan, rounding
from moepass.upcycle.hf.sizes import measure
from moepass.upcycle.hf.step0 import measure_step0
from moepass.upcycle.hf.tensors import block_of, check_names, out_tensors
from moepass.upcycle.modules import matches_any
from moepass.upcycle.own import schema as own

#: ``dtype=`` -> code of safetensors.
DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Asked:
    """What the user asks for; ``command.upcycle_checkpoint`` explains each.  ``patterns``: globs over layers."""

    recipe: Recipe
    to: str | None
    patterns: Sequence[str]
    dtype: str | None
    parents: tuple[Path, ...]
    others: str | None
    prompts: Given | None
    calibration: str | os.PathLike[str] | None
    calibration_tokens: Ids | None
    max_shard_size: int
    resume: bool
    dry_run: bool


@dataclass(frozen=True)
class Job:
    """Everything that a run needs, planned and checked.  ``source``: what recipes read, parents included."""

    source: Source
    tensors: list[OutTensor]
    files: dict[str, bytes]
    shards: tuple[Shard, ...]
    facts: card.Facts
    content: dict[str, Any]
    stem: str = "model"


@dataclass(frozen=True)
class _Known:
    """What is decided once the headers are read."""

    source: Source
    found: Match
    planned: Plan
    shape: Shape
    parents: Parents | None
    #: The parents, unless their blocks are SRC's: then it is the recipe on SRC alone.
    givers: Parents | None
    given: Calibration | None
    code: str | None


def prepare(src: Path, dst: Path, asked: Asked) -> Job:
    """Raises every refusal of ``upcycle_checkpoint``."""
    if asked.to == own.NAME:
        return _prepare_own(src, dst, asked)
    known = _know(src, dst, asked)
    found, planned, shape, givers, code = known.found, known.planned, known.shape, known.givers, known.code
    config = host_config(found, shape, asked.dtype)
    extra, notes, remarks = about(known.parents, planned)
    # Names and sizes first: what cannot be written is refused before what takes its time.
    outline = out_tensors(known.source, found, planned, shape, code, Extras(parents=givers))
    check_names(outline, config.config, shape.layers, src)
    small, left_out = small_files(src)
    small["config.json"] = config_bytes(config.json)
    joined = known.source if givers is None else givers.joined
    shards, no_room = _check(dst, outline, joined, small, asked)
    extras = _extras(known, asked)
    warnings = (*planned.warnings, *config.warnings, *left_out, *_about_shared(found, planned), *remarks, *no_room)
    if extras.prompts is not None:
        extra["prompts"] = extras.prompts.to_dict()
        warnings += extras.prompts.warnings
    tensors = out_tensors(known.source, found, planned, shape, code, extras)
    facts = _facts(known, asked, tensors, shards, warnings)
    facts = replace(facts, extra=extra, notes=notes)
    if not facts.exact:
        block = block_of(known.source, found, planned, shape.layers[0], code, extras)
        facts = replace(facts, measured=measure_step0(joined, block, known.given))
    return _job(joined, tensors, small, shards, facts, src)


def _job(
    source: Source,
    tensors: list[OutTensor],
    small: dict[str, bytes],
    shards: tuple[Shard, ...],
    facts: card.Facts,
    src: Path,
    stem: str = "model",
) -> Job:
    """Report and model card join the small files."""
    content = card.report(facts, tensors)
    written = {
        card.REPORT: (json.dumps(content, indent=1, sort_keys=True) + "\n").encode(),
        "README.md": card.readme(_old_card(src), facts).encode(),
    }
    return Job(source, tensors, small | written, shards, facts, content, stem)


def _prepare_own(src: Path, dst: Path, asked: Asked) -> Job:
    """As ``prepare``, for ``--to moepass``."""
    from moepass.upcycle.own.plan import draft  # it traces models, which needs most of moepass
    from moepass.upcycle.own.step0 import measure_step0 as measure_own

    _only_for_hosts(asked)
    source, code = Source.open(src), _dtype_code(asked.dtype)
    check_folders(src, dst, resume=asked.resume)
    made = draft(source, asked.recipe, asked.patterns, code)
    small, left_out = small_files(src)
    small |= made.files
    shards, no_room = _check(dst, made.tensors, source, small, asked, own.STEM)
    sizes = made.sizes([(s.name, s.nbytes) for s in shards])
    floating = [h.dtype for h in source.headers.values() if h.dtype in FLOATS]
    rounded = rounding(made.plan, floating, made.expert_code, code)
    warnings = (*made.plan.warnings, *made.warnings, *left_out, *no_room)
    facts = card.Facts(source, made.found, made.plan, sizes, made.layers, asked.dtype, warnings, rounded)
    if not facts.exact:
        facts = replace(facts, measured=measure_own(source, made))
    return _job(source, made.tensors, small, shards, facts, src, own.STEM)


def _only_for_hosts(asked: Asked) -> None:
    """Options that need the layout of a family: the own format takes any architecture, so it cannot know it."""
    given = {
        "experts_from": [str(p) for p in asked.parents] or None,
        "others": asked.others,
        "prompts": asked.prompts,
        "calibration": asked.calibration,
        "calibration_tokens": asked.calibration_tokens,
        "router": asked.recipe.router if asked.recipe.router in {"centroids", "prompts"} else None,
        "cluster_on": asked.recipe.cluster_on if asked.recipe.cluster_on != "weights" else None,
    }
    for name, value in given.items():
        if value is not None:
            detail = f"--to {own.NAME} cannot do that; choose a host of transformers, or leave it out"
            raise errors.BadOption(name=name, value=value, detail=detail)


def _know(src: Path, dst: Path, asked: Asked) -> _Known:
    code = _dtype_code(asked.dtype)
    source = Source.open(src)
    found = match(source.config, asked.to)
    layers = _chosen(found, asked.patterns)
    for folder in (src, *asked.parents):
        check_folders(folder, dst, resume=asked.resume)
    parents = open_parents(source, found, asked.parents, asked.others)
    difference = None if parents is None else parents.difference(found, [block_name(i) for i in layers])
    planned = plan(asked.recipe, found.host, found.config.intermediate_size, difference)
    shape = _shape(found, planned, layers)
    given = read_calibration(src, found.config, asked.calibration, asked.calibration_tokens)
    check_calibration(planned, given)
    return _Known(source, found, planned, shape, parents, None if difference is None else parents, given, code)


def _extras(known: _Known, asked: Asked) -> Extras:
    """What takes its time."""
    layers = known.shape.layers
    prompts = router_for(asked.prompts, known.source, known.planned, layers, len(asked.parents))
    arranged = arrange(known.source, known.found, known.planned, layers, known.given)
    return Extras(arranged, prompts, known.givers)


def _facts(
    known: _Known, asked: Asked, tensors: list[OutTensor], shards: Sequence[Shard], warnings: tuple[str, ...]
) -> card.Facts:
    source, found, planned, recipe = known.source, known.found, known.planned, asked.recipe
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
    rounded = rounding(planned, floating, expert, known.code)
    if known.given is not None and planned.verdict.exact and rounded is None and not uses_calibration(recipe):
        warnings += ("nothing in this recipe looks at the calibration",)
    return card.Facts(
        source, found, planned, sizes, known.shape.layers, asked.dtype, warnings, rounded, calibration=known.given
    )


def _check(
    dst: Path, tensors: list[OutTensor], source: Source, files: dict[str, bytes], asked: Asked, stem: str = "model"
) -> tuple[tuple[Shard, ...], tuple[str, ...]]:
    """The writer's checks; a disk that is too small is only a warning to somebody who does not write to it yet."""
    try:
        options: dict[str, Any] = {"max_shard_size": asked.max_shard_size, "resume": asked.resume, "stem": stem}
        return check(dst, tensors, source, files, **options), ()
    except errors.BadDestination as error:
        if not asked.dry_run or error.fields["reason"] != "no_space":
            raise
        return plan_shards(tensors, asked.max_shard_size, stem), (str(error),)


def _shape(found: Match, planned: Plan, layers: tuple[int, ...]) -> Shape:
    """Raises ``BadOption`` where the host cannot leave these layers dense."""
    recipe, config = planned.recipe, found.config
    shape = Shape(
        experts=recipe.experts,
        top_k=recipe.top_k,
        width=planned.width,
        renormalize=recipe.renormalize,
        layers=layers,
        num_layers=config.num_hidden_layers,
        config=config,
        features=found.features,
        shared=recipe.shared,
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


def _about_shared(found: Match, planned: Plan) -> list[str]:
    if not found.host.zero_shared or planned.recipe.shared:
        return []
    return [f"{found.host.model_type} always has a shared expert: it starts at zero and costs as much as an expert"]


def _old_card(src: Path) -> str | None:
    path = src / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
