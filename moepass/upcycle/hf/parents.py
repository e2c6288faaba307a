"""Several parents: fine-tunes of one base, whose feed-forward blocks become the experts.

Contract
    in    the opened base SRC with its match, folders of parents, the rule for all other weights
    out   ``Parents``: checked against SRC; which pieces an expert is made from; ``joined``, the source that the writer
          reads, in which tensor x of parent k is ``parent.k/x``
    Headers are read and every refusal raised before anything is written; parents are never written to.
The rule for the other weights (attention, norms, embeddings, layers that stay dense)
    average  mean of the parents, the default: the rule of Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816),
             the only one of the two with published results after training
    base     SRC's bytes (mergekit-moe): right where parents differ in their feed-forward blocks only
Experts of one parent stand together: with E = m * parents, expert e is from parent e // m, as in BTX scripts.  With
virtual groups this holds for groups, so that a group is one block of one parent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepass import errors
from moepass.upcycle.checkpoint.journal import fingerprint
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import FLOATS, Header, OutTensor, torch_dtype
from moepass.upcycle.exactness import SPLITS
from moepass.upcycle.hf.match import Match
from moepass.upcycle.hf.pieces import Piece, cast_code, computed, passed_on, pieces
from moepass.upcycle.hf.recipe import Plan
from moepass.upcycle.hf.same_architecture import check_config, check_tensors, check_vocabulary

OTHERS = ("average", "base")
#: Elements that are averaged, and bytes that are compared, at a time.
_PIECE, _COMPARED = 1 << 20, 8 << 20


@dataclass(frozen=True)
class Parents:
    """Make it with ``open_parents``.

    ``paths``  as the user gave them; ``sources``: opened; ``others``: one of ``OTHERS``
    ``named``  per parent: unfused name -> piece, whose tensor has its name in ``joined``
    """

    paths: tuple[Path, ...]
    sources: tuple[Source, ...]
    others: str
    base: Source
    named: tuple[dict[str, Piece], ...]

    @property
    def joined(self) -> Source:
        """SRC's tensors under their own names and the parents' under ``parent.k/``; config of SRC."""
        headers, state = dict(self.base.headers), dict(self.base.state)
        for k, source in enumerate(self.sources):
            headers |= {_name(k, n): replace(h, name=_name(k, n)) for n, h in source.headers.items()}
            state |= source.state
        return Source(self.base.folder, self.base.config, headers, state)

    def of(self, name: str) -> tuple[Piece, ...]:
        """The piece of this unfused name in each parent."""
        return tuple(named[name] for named in self.named)

    def other(self, name: str, piece: Piece, wanted: str | None) -> OutTensor:
        """A tensor outside the experts by the rule; ``piece`` is SRC's.  The mean has SRC's dtype, or ``wanted``."""
        if self.others == "base" or piece.dtype not in FLOATS:
            return passed_on(name, piece, wanted)
        used, code = self.of(name), cast_code(piece.dtype, wanted)
        if len(used) == 1:
            return passed_on(name, used[0], code)
        dtype = torch_dtype(code)
        recipe = computed(used, lambda xs: mean(xs, dtype), f"mean of {len(used)} parents", dtype)
        return OutTensor(name, piece.shape, code, recipe, piece.source)

    def difference(self, found: Match, blocks: Sequence[str]) -> str | None:
        """Why the output is not SRC's function whatever the recipe, or None: then it is the recipe on SRC alone.

        Compares bytes: those of the feed-forward ``blocks``, and of all else where it is averaged.  Stops at the first
        difference, so only parents that are equal are read in full.
        """
        inside = tuple(f"{block}." for block in blocks)
        for name, ours in pieces(self.base.headers, found).items():
            if name.startswith(inside) or self.others == "average":
                for path, theirs in zip(self.paths, self.of(name), strict=True):
                    if not _same_bytes(self.base.headers[ours.source], self._header(theirs)):
                        return _not_the_base(path.name, name)
        return None

    def check_count(self, plan: Plan) -> None:
        """Every parent gets the same number of experts.  Raises ``NotDivisible``, ``BadOption``."""
        if plan.init.method in SPLITS:
            detail = "it cuts one block into parts that are not whole without each other; choose copy or virtual-groups"
            raise errors.BadOption(name="init", value=plan.recipe.method, detail=f"with --experts-from {detail}")
        blocks, P = plan.recipe.experts // plan.cut, len(self.sources)
        if blocks % P:
            what = "experts" if plan.cut == 1 else "experts / granularity"
            remedy = f"give --experts {P * plan.cut} or a multiple"
            raise errors.NotDivisible(
                what=what, value=blocks, by_what="the number of parents", by=P, where="the recipe", remedy=remedy
            )

    def to_dict(self, plan: Plan) -> dict[str, Any]:
        """For the report: every parent's path and fingerprint, and which parent an expert is from."""
        P, E = len(self.sources), plan.recipe.experts
        listed = [{"path": str(p), "fingerprint": _identity(s)} for p, s in zip(self.paths, self.sources, strict=True)]
        return {"others": self.others, "of": listed, "expert": [parent_of(e, E, plan.cut, P) for e in range(E)]}

    def warnings(self) -> list[str]:
        """Parents in another dtype than SRC are cast."""
        ours, found = _floats(self.base), []
        for path, source in zip(self.paths, self.sources, strict=True):
            if (theirs := _floats(source)) != ours:
                found.append(f"{path.name} holds {', '.join(theirs)}: cast to SRC's {', '.join(ours)}")
        return found

    def _header(self, piece: Piece) -> Header:
        k, _, name = piece.source.removeprefix("parent.").partition("/")
        return self.sources[int(k)].headers[name]


def folder_list(folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """One folder, or several."""
    return [Path(f) for f in ([folders] if isinstance(folders, str | os.PathLike) else folders)]


def open_parents(base: Source, found: Match, folders: Sequence[Path], others: str | None = None) -> Parents | None:
    """Open the parents and hold them against SRC; None where there are none.

    A folder may be listed twice, and SRC may be listed.  Raises ``BadOption``, ``BadCheckpoint``, ``ParentDiffers``.
    """
    if not folders:
        if others is not None:
            raise errors.BadOption(name="others", value=others, detail="it is for --experts-from only")
        return None
    rule = OTHERS[0] if others is None else others
    if rule not in OTHERS:
        raise errors.BadOption(name="others", value=others, detail=f"choose one of {', '.join(OTHERS)}")
    sources = tuple(Source.open(folder) for folder in folders)
    ours, named = pieces(base.headers, found), []
    for k, parent in enumerate(sources):
        check_config(base, parent, found)
        theirs = pieces(parent.headers, found)
        check_tensors(base, parent, ours, theirs)
        check_vocabulary(base, parent)
        named.append({name: replace(piece, source=_name(k, piece.source)) for name, piece in theirs.items()})
    return Parents(tuple(folders), sources, rule, base, tuple(named))


def about(parents: Parents | None, plan: Plan) -> tuple[dict[str, Any], tuple[str, ...], list[str]]:
    """For the report: entries, lines for people (no paths of this machine), warnings.  Raises as ``check_count``."""
    if parents is None:
        return {}, (), []
    parents.check_count(plan)
    rule = "their mean" if parents.others == "average" else "those of SRC"
    note = f"experts from {', '.join(p.name or str(p) for p in parents.paths)}; other weights: {rule}"
    return {"parents": parents.to_dict(plan)}, (note,), parents.warnings()


def parent_of(e: int, experts: int, cut: int, parents: int) -> int:
    """Whose block expert ``e`` is made from; ``cut`` experts share a block, blocks of one parent stand together."""
    return e // cut * parents // (experts // cut)


def mean(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Mean of tensors of one shape, taken in float64 and rounded once to ``dtype``."""
    out = torch.empty(tensors[0].shape, dtype=dtype)
    parts = zip(*(x.reshape(-1).split(_PIECE) for x in tensors), strict=True)
    for result, values in zip(out.view(-1).split(_PIECE), parts, strict=True):
        total = values[0].to(torch.float64, copy=True)
        for x in values[1:]:
            total += x
        total /= len(values)
        result.copy_(_to_odd(total) if result.element_size() < 4 else total)
    return out


def _to_odd(x: Tensor) -> Tensor:
    """float64 -> float32, to an odd last bit where inexact: rounding that once more is rounding ``x`` once.

    torch casts float64 to bfloat16 by way of float32, which rounds twice.
    """
    near = x.float()
    wrong = (near.double() != x) & (near.view(torch.int32) % 2 == 0)
    towards = torch.where(x > near, torch.inf, -torch.inf).float()
    return torch.where(wrong, torch.nextafter(near, towards), near)


def _name(k: int, name: str) -> str:
    return f"parent.{k}/{name}"


def _not_the_base(path: str, name: str) -> str:
    return f"the experts come from other models, so this is not SRC's function (first difference: {name} of {path})"


def _same_bytes(a: Header, b: Header) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.begin == b.begin and os.path.samefile(a.file, b.file):
        return True
    with a.file.open("rb") as x, b.file.open("rb") as y:
        x.seek(a.begin)
        y.seek(b.begin)
        return all(x.read(n) == y.read(n) for n in _chunks(a.nbytes))


def _chunks(nbytes: int) -> list[int]:
    whole, rest = divmod(nbytes, _COMPARED)
    return [_COMPARED] * whole + [rest] * bool(rest)


def _floats(source: Source) -> list[str]:
    return sorted({h.dtype for h in source.headers.values() if h.dtype in FLOATS})


def _identity(source: Source) -> str:
    """Identifies config, tensors and, by samples, the values: fine-tunes of one base differ in nothing else."""
    headers = sorted((h.name, h.dtype, h.shape) for h in source.headers.values())
    content: Mapping[str, Any] = {
        "config": source.config,
        "headers": headers,
        "samples": {path.name: fingerprint(path) for path in sorted(source.state)},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
