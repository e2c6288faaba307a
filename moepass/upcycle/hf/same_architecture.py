"""Is a parent a fine-tune of the base?  From config, tensor headers and tokenizer; no weight is read.

A difference that would enter the function raises ``ParentDiffers`` with the field and both values.  Names, paths and
dtypes may differ, and so may what acts in training or generation only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from moepass import errors
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.hf.match import Match, declared, resolve
from moepass.upcycle.hf.pieces import Piece

#: Fields without influence on the logits of given tokens, in every family.
_OUTSIDE = {"attention_dropout", "bos_token_id", "eos_token_id", "eod_token_id", "initializer_range", "pad_token_id",
            "use_cache"}  # fmt: skip
_REMEDY = "give fine-tunes of one base"


def check_config(base: Source, parent: Source, found: Match) -> None:
    """Every declared field that enters the function is the same.  Raises ``ParentDiffers``, ``NoHost``."""
    ours, theirs = base.config.get("model_type"), parent.config.get("model_type")
    if ours != theirs:
        _differ(base, parent, "model_type", ours, theirs)
    config = resolve(parent.config)
    fields = declared(found.config) - found.family.ignored - found.family.training - _OUTSIDE
    if _rope_type(found.config) == "default":  # other kinds may scale with the length
        fields -= {"max_position_embeddings"}
    for field in sorted(fields | {"tie_word_embeddings"}):
        path, mine, other = _first_difference(field, getattr(found.config, field), getattr(config, field))
        if mine != other:
            _differ(base, parent, path, mine, other)


def check_tensors(base: Source, parent: Source, ours: dict[str, Piece], theirs: dict[str, Piece]) -> None:
    """The same names and shapes, fused matrices taken apart.  Raises ``ParentDiffers``."""
    for name in (*ours, *theirs):
        mine, other = (named[name].shape if name in named else None for named in (ours, theirs))
        if mine != other:
            _differ(base, parent, f"the tensor {name!r}", _shape(mine), _shape(other))


def check_vocabulary(base: Source, parent: Source) -> None:
    """Tokenizers, where both folders have one that can be read, give the same token the same id.

    Added tokens may differ: fine-tunes name the reserved ones.  Raises ``ParentDiffers``.
    """
    ours, theirs = _vocabulary(base.folder), _vocabulary(parent.folder)
    if ours is None or theirs is None or ours == theirs:
        return
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        _differ(base, parent, "the vocabulary of tokenizer.json", "another one", "another one")
    token = next(t for t in (*ours, *theirs) if ours.get(t) != theirs.get(t))
    _differ(base, parent, f"the id of token {token!r}", ours.get(token), theirs.get(token))


def _differ(base: Source, parent: Source, field: str, ours: object, theirs: object) -> NoReturn:
    raise errors.ParentDiffers(
        parent=parent.folder, base=base.folder, field=field, ours=ours, theirs=theirs, remedy=_REMEDY
    )


def _first_difference(field: str, ours: Any, theirs: Any) -> tuple[str, Any, Any]:
    """Down to the entry of a mapping."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in (*ours, *theirs):
            if ours.get(key) != theirs.get(key):
                return _first_difference(f"{field}.{key}", ours.get(key), theirs.get(key))
    return field, ours, theirs


def _rope_type(config: Any) -> str:
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"


def _vocabulary(folder: Path) -> Any:
    try:
        return json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
