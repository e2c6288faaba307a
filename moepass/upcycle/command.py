"""``moepass.upcycle_checkpoint``: a dense Hugging Face folder becomes a MoE folder that stock transformers load.

Stages
    prepare  every refusal comes from here, before anything is written (``hf.prepare``)
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
from moepass.upcycle.checkpoint.shards import MAX_SHARD_SIZE
from moepass.upcycle.checkpoint.writer import WORKERS, Progress, WriteReport, write
from moepass.upcycle.hf import card
from moepass.upcycle.hf.calibration import Ids
from moepass.upcycle.hf.parents import folder_list
from moepass.upcycle.hf.prepare import Asked, prepare
from moepass.upcycle.hf.prompts import Given
from moepass.upcycle.hf.recipe import Recipe
from moepass.upcycle.hf.sizes import Sizes
from moepass.upcycle.modules import glob_list

if TYPE_CHECKING:
    from moepass.upcycle.checkpoint.verify import VerifyReport

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


def upcycle_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str | None = None,
    init: str = "copy",
    experts: int | None = None,
    top_k: int = 2,
    granularity: int = 2,
    noise_std: float = 0.05,
    drop_ratio: float = 0.5,
    drop_indices: str = "shared",
    cluster_on: str = "weights",
    shared: int = 0,
    calibration: str | os.PathLike[str] | None = None,
    calibration_tokens: Ids | None = None,
    router: str = "orthogonal",
    router_std: float = 0.1,
    prompts: Given | None = None,
    renormalize: bool = True,
    experts_from: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    others: str | None = None,
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
    ``init``         ``copy``, ``virtual-groups``, ``noise``, ``drop``, ``split`` or ``cluster``; see
                     ``hf.recipe.Recipe`` for these and ``experts`` ... ``renormalize``; ``experts`` None: 8, or one
                     (virtual-groups: one group) for each of ``experts_from``
    ``calibration``  a text file for recipes that look at neurons at work, tokenised by the source's tokenizer; or
                     ``calibration_tokens``, lists of ids: the first 4096 tokens count
    ``prompts``      for ``router="prompts"``: a JSON file or its content, a list with one entry per expert (virtual
                     group, parent), each a list of texts or of lists of token ids; ``hf.prompts`` has the formula
    ``experts_from`` fine-tunes of SRC's base whose blocks become the experts; ``others``: the other weights are the
                     ``average`` of these (the default, as in Branch-Train-MiX) or those of the ``base`` SRC
    ``layers``       globs over ``model.layers.N.mlp``; the others stay dense, where the host can have both
    ``dtype``        ``float32``, ``bfloat16`` or ``float16`` for all weights; None keeps each tensor's own
    ``max_shard_size``  bytes, or text such as ``5GB``
    ``resume``       continue an interrupted run of the same command; the bytes are those of an uninterrupted one
    ``dry_run``      plan and check only; nothing is written
    ``verify``       compare the two functions afterwards, in float32; the result is in the report
    The bytes depend on source, options and versions alone.  SRC is never written to.
    Raises ``BadCheckpoint``, ``NoHost``, ``HostRefuses``, ``ParentDiffers``, ``UnexpectedTensor``, ``BadOption``,
    ``NotDivisible``, ``TopKTooLarge``, ``BadDestination``, ``MissingPackage``, ``NotVerifiable`` (prompts): each before
    anything is written, except a disk that fills.
    """
    folders = folder_list(experts_from)
    if experts is None:
        experts = len(folders) * (granularity if init == "virtual-groups" else 1) or 8
    recipe = Recipe(
        method=init,
        experts=experts,
        top_k=top_k,
        granularity=granularity,
        noise_std=noise_std,
        drop_ratio=drop_ratio,
        drop_indices=drop_indices,
        cluster_on=cluster_on,
        shared=shared,
        router=router,
        router_std=router_std,
        renormalize=renormalize,
        seed=seed,
    )
    size = parse_size(max_shard_size)
    job = prepare(
        Path(src),
        Path(dst),
        Asked(
            recipe,
            to,
            glob_list(layers),
            dtype,
            tuple(folders),
            others,
            prompts,
            calibration,
            calibration_tokens,
            size,
            resume,
            dry_run,
        ),
    )
    report = UpcycleReport(Path(dst), job.facts, job.content)
    if dry_run:
        return report
    options: dict[str, Any] = {"max_shard_size": size, "resume": resume, "stem": job.stem}
    written = write(dst, job.tensors, job.source, job.files, workers=workers, progress=progress, **options)
    report = replace(report, written=written)
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
