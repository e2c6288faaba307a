"""``moepass.convert``: exchange the feed-forward blocks of a model for ``moepass.nn.MoE``, in place.

Stages
    find     trace the modules, recognise the blocks (``upcycle.find``); nothing changes
    choose   globs and every n-th; complete a spec per block: impossible requests raise here, before anything changes
    make     weights of one block at a time (``upcycle.init``), so that the dense model never exists twice
    replace  put the MoE in place, check it by numbers where the init is exact, put the dense block back if it differs
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from moepass import errors
from moepass.nn.moe import MoE
from moepass.nn.origin import Origin, Place, dense_matrices
from moepass.spec import InitMethod, InitSpec, MoESpec
from moepass.upcycle import verify
from moepass.upcycle.exactness import Exactness, exactness
from moepass.upcycle.existing.walk import convert_existing
from moepass.upcycle.find import Block, covered, find
from moepass.upcycle.init import MoEWeights, complete, initialise
from moepass.upcycle.modules import Names, build_moe, glob_list, matches_any, replace_site
from moepass.upcycle.report import ConversionReport, ConvertedMoE, ConvertedSite, SkippedSite


@dataclass(frozen=True)
class SiteInfo:
    """What a block is, for ``weights_for`` hooks.  ``ups``, ``down``: the dense weights as the model stores them."""

    id: str
    where: str
    spec: MoESpec
    init: InitSpec
    ups: tuple[Tensor, ...]
    down: Tensor


WeightsFor = Callable[[SiteInfo], MoEWeights | None]

#: Arguments that say how dense blocks are converted, with their defaults.
_DENSE_ONLY = {"spec": None, "every": 1, "init": "virtual_groups", "seed": 0}


@dataclass(frozen=True)
class _Job:
    """A chosen block with its completed spec.  ``tied`` blocks share all their weights and get the same MoE."""

    block: Block
    spec: MoESpec
    init: InitSpec
    verdict: Exactness


def convert(
    model: nn.Module,
    spec: MoESpec | None = None,
    *,
    layers: str | Sequence[str] = "*",
    every: int = 1,
    init: str | InitSpec = "virtual_groups",
    seed: int = 0,
    existing: bool = False,
    weights_for: WeightsFor | None = None,
) -> ConversionReport:
    """Replace the dense feed-forward blocks of ``model`` by ``moepass.nn.MoE``, in place, and say what was done.

    ``spec``     MoE semantics; what it leaves open comes from the dense block.  None: 8 experts, top-2.
    ``layers``   globs over block names (``model.layers.*.mlp``), comma separated or a sequence.
    ``every``    convert the n-th, 2n-th ... of the blocks that ``layers`` selects, in model order.
    ``init``     a method's name, or an ``InitSpec`` (which then carries the seed).
    ``seed``     weights depend on (seed, block name) only: equal on every rank and in every order.

    ``existing`` hand the MoE blocks that the model already has to moepass instead, and leave dense blocks alone: what
                 is found is proved by numbers before it is exchanged (``upcycle.existing``).  Takes ``layers`` only.

    Blocks are found by tracing, so hand-written modules work as well as those of libraries.  Parameters keep dtype,
    device and requires_grad; modules keep their training flag; modules shared between layers stay shared.  On the meta
    device no data is touched.  A second call changes nothing.
    Raises ``CannotConvert`` for compiled or sharded models, and the errors of ``upcycle.init.complete``; the model is
    unchanged then.  ``weights_for`` is internal: it supplies trained weights, or None to leave a block dense.
    """
    _refuse(model)
    if spec is not None and not isinstance(spec, MoESpec):
        raise errors.BadOption(name="spec", value=spec, detail="give a moepass.MoESpec, or None for the default")
    if existing:
        return _convert_existing(model, layers, {"spec": spec, "every": every, "init": init, "seed": seed})
    how = _init_spec(init, seed)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise errors.BadOption(name="every", value=every, detail="it must be an integer of at least 1")
    findings = find(model)
    chosen, skipped = _choose(findings.blocks, glob_list(layers), every)
    groups, tied = _tie(Names(model), [_job(block, spec or MoESpec(), how) for block in chosen])
    findings.blocks.clear()
    chosen.clear()
    converted: list[ConvertedSite] = []
    while groups:  # a group that is done may not keep its dense weights alive
        outcome = _convert_group(model, groups.popleft(), weights_for)
        converted.extend(s for s in outcome if isinstance(s, ConvertedSite))
        skipped.extend(s for s in outcome if isinstance(s, SkippedSite))
    report = ConversionReport(how, tuple(converted), (*findings.skipped, *skipped, *tied))
    if not converted and not any(s.reason == "already_moe" for s in report.skipped):
        warnings.warn(f"moepass.convert changed nothing: {report}", stacklevel=2)
    return report


def _convert_existing(model: nn.Module, layers: str | Sequence[str], others: dict[str, object]) -> ConversionReport:
    for name, value in others.items():
        if value != _DENSE_ONLY[name]:
            raise errors.BadOption(name=name, value=value, detail="it is for dense blocks; existing=True takes layers")
    outcomes = convert_existing(model, glob_list(layers))
    converted = tuple(each for each in outcomes if isinstance(each, ConvertedMoE))
    report = ConversionReport(None, converted, tuple(each for each in outcomes if isinstance(each, SkippedSite)))
    if not converted and not any(s.reason == "already_moe" for s in report.skipped):
        warnings.warn(f"moepass.convert changed nothing: {report}", stacklevel=3)
    return report


def _refuse(model: nn.Module) -> None:
    where = type(model).__name__
    for module in model.modules():
        if hasattr(module, "_orig_mod"):
            raise errors.CannotConvert(where=where, detail="it is compiled already (convert model._orig_mod)")
        kinds = {base.__name__ for base in type(module).__mro__}
        if kinds & {"FullyShardedDataParallel", "FSDPModule", "DistributedDataParallel", "DataParallel"}:
            raise errors.CannotConvert(where=where, detail=f"{type(module).__name__} has taken over its parameters")
    for name, parameter in model.named_parameters():
        if any(base.__name__ == "DTensor" for base in type(parameter).__mro__):
            raise errors.CannotConvert(where=where, detail=f"{name} is sharded")


def _init_spec(init: str | InitSpec, seed: int) -> InitSpec:
    if isinstance(init, InitSpec):
        if seed not in (0, init.seed):
            raise errors.BadOption(name="seed", value=seed, detail=f"the InitSpec already says seed={init.seed}")
        return init
    if init not in get_args(InitMethod):
        raise errors.BadOption(name="init", value=init, detail=f"choose one of {', '.join(get_args(InitMethod))}")
    return InitSpec(method=init, seed=seed)


def _choose(blocks: Sequence[Block], patterns: Sequence[str], every: int) -> tuple[list[Block], list[SkippedSite]]:
    chosen = [block for block in blocks if matches_any((block.id, *block.location.moe), patterns)][every - 1 :: every]
    return chosen, [SkippedSite(block.id, "not_selected", "") for block in blocks if block not in chosen]


def _job(block: Block, spec: MoESpec, init: InitSpec) -> _Job:
    shape = block.shape
    full = complete(
        spec,
        F=shape.F,
        D=shape.D,
        program=shape.program,
        init=init,
        bias_in=shape.ups[0].bias is not None,
        bias_out=shape.down.bias is not None,
        dropout=shape.dropout,
        where=block.id or type(block.module).__name__,
    )
    return _Job(block, full, init, exactness(full, init))


def _tie(names: Names, jobs: Sequence[_Job]) -> tuple[deque[list[_Job]], list[SkippedSite]]:
    """Jobs grouped by shared weights; blocks whose weights are also used outside their group are left alone."""
    by_weights: dict[tuple[object, ...], list[_Job]] = {}
    for job in jobs:
        shape, module = job.block.shape, job.block.module
        key = (job.spec, *((id(module.get_parameter(p)), shape.program) for p in shape.parameters))
        by_weights.setdefault(key, []).append(job)
    groups, tied = deque[list[_Job]](), list[SkippedSite]()
    for group in by_weights.values():
        gone = {i for job in group for i in covered(job.block)}
        shape, module = group[0].block.shape, group[0].block.module
        if all(names.owners[id(module.get_parameter(p))] <= gone for p in shape.parameters):
            groups.append(group)
        else:
            tied += [SkippedSite(job.block.id, "tied_weight", "") for job in group]
    return groups, tied


def _convert_group(
    model: nn.Module, group: Sequence[_Job], weights_for: WeightsFor | None
) -> list[ConvertedSite | SkippedSite]:
    job = group[0]
    block = job.block
    parameters = [block.module.get_parameter(name) for name in block.shape.parameters]
    weights = _weights(job) if weights_for is None else weights_for(_info(job))
    if weights is None:
        return [SkippedSite(each.block.id, "no_state", "") for each in group]
    moe = build_moe(weights, job.spec, any(p.requires_grad for p in parameters))
    exact = job.verdict.exact and weights_for is None and not weights.w_in.is_meta
    outcome: list[ConvertedSite | SkippedSite] = []
    places: list[Place] = []
    for each in group:
        place = each.block.place  # before the MoE stands there
        failure = _replace(model, each, moe, check=exact)
        outcome.append(_site(model, each, moe, parameters) if failure is None else _failed(each, failure))
        places += [place] if failure is None else []
    moe.origin = Origin(block.id, job.init, tuple(places))
    return outcome


def _replace(model: nn.Module, job: _Job, moe: MoE, *, check: bool) -> str | None:
    """Put the MoE in place; None, or why it was taken out again."""
    block, like = job.block, moe.w_in
    if not check:
        replace_site(model, block.location, moe)
        return None
    try:
        before = verify.run(model.get_submodule(block.name), _tap(block), block.input_width, like)
    except Exception as raised:  # a block that insists on a narrow dtype, say: then nothing can be proved
        return f"the dense block does not run in float32: {errors.first_line(raised)}"
    undo = replace_site(model, block.location, moe)
    try:
        after = verify.run(model.get_submodule(block.name), moe, block.input_width, like)
        error = before.mismatch(after)
        if error <= verify.tolerance(like.dtype, job.verdict.scale, job.verdict.out_scale):
            return None
        detail = f"relative difference {error:.1e}"
    except Exception as raised:  # the block goes back whatever happened
        detail = f"{type(raised).__name__}: {raised}"
    undo()
    return detail


def _tap(block: Block) -> nn.Module:
    """The module whose output is the dense block's."""
    place = block.boundary
    if place.splice is not None:
        return block.module.get_submodule(place.splice.down)
    return block.module.get_submodule(place.chain[-1]) if place.chain else block.module


def _weights(job: _Job) -> MoEWeights:
    """Initial MoE weights of a block, from its dense ones."""
    shape, module = job.block.shape, job.block.module
    with torch.no_grad():
        dense = dense_matrices(shape.ups, shape.down, module.get_parameter)
        return initialise(*dense, job.spec, job.init, job.block.id)


def _info(job: _Job) -> SiteInfo:
    shape, module = job.block.shape, job.block.module
    ups = tuple(module.get_parameter(part.weight) for part in shape.ups)
    where = job.block.location.moe[0]
    return SiteInfo(job.block.id, where, job.spec, job.init, ups, module.get_parameter(shape.down.weight))


def _site(model: nn.Module, job: _Job, moe: MoE, dense: Sequence[Tensor]) -> ConvertedSite:
    E, D, F = moe.w_out.shape
    return ConvertedSite(
        id=job.block.id,
        where=next(name for name, module in model.named_modules() if module is moe),
        D=D,
        F=F,
        E=E,
        K=job.spec.router.top_k,
        activation=job.block.shape.program,
        method=job.init.method,
        exact=job.verdict.exact,
        reason=job.verdict.reason,
        parameters_before=sum(p.numel() for p in dense),
        parameters_after=sum(p.numel() for p in moe.parameters()),
    )


def _failed(job: _Job, detail: str) -> SkippedSite:
    return SkippedSite(job.block.id, "verification_failed", detail)
