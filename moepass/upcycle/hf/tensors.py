"""Every tensor of the output with its recipe, from the source's headers alone.

Contract
    in    an opened source, a ``Match``, a ``Plan``, the ``Shape``, the dtype wanted, ``Extras``: what the recipe needs
          beside the dense weights of the source
    out   ``OutTensor``s: embeddings, layer by layer, the rest; experts of one projection stand together, so that the
          writer reads each dense matrix once
    A source tensor without a place in the output, and a place without a tensor, raise ``UnexpectedTensor``.
Copies of whole matrices are verbatim bytes.  Draws are keyed by (seed, ``model.layers.N.mlp``, expert, projection), as
in ``moepass.convert``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from moepass import errors
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import OutTensor
from moepass.upcycle.hf.block import MATRICES, Block, Extras
from moepass.upcycle.hf.hosts import Shape
from moepass.upcycle.hf.match import Match, transformers
from moepass.upcycle.hf.pieces import Piece, block_name, passed_on, pieces
from moepass.upcycle.hf.recipe import Plan

_CHECK_CONFIG = "check that config.json belongs to these tensors"


def out_tensors(
    source: Source, found: Match, plan: Plan, shape: Shape, dtype: str | None, extras: Extras | None = None
) -> list[OutTensor]:
    """What to write.  ``dtype``: code of safetensors for all floating tensors; None keeps each as it is.

    Without the extras that the plan wants, names, shapes and dtypes are right and the values are not.  With parents the
    recipes are over ``parents.joined``.
    """
    extras = extras or Extras()
    named = pieces(source.headers, found)
    blocks = {i: _take_block(named, i, source, found) for i in shape.layers}
    other = passed_on if extras.parents is None else extras.parents.other
    ordered: list[tuple[tuple[int, int], OutTensor]] = [
        (_place(name), other(name, piece, dtype)) for name, piece in named.items()
    ]
    for i, (gate, up, down) in blocks.items():
        block = Block(i, (gate, up), down, found, plan, dtype, extras)
        ordered += [((1, i), tensor) for tensor in block.tensors()]
    return [tensor for _, tensor in sorted(ordered, key=lambda pair: pair[0])]


def block_of(
    source: Source, found: Match, plan: Plan, layer: int, dtype: str | None, extras: Extras | None = None
) -> Block:
    """One layer's MoE alone, for a look at its values before anything is written."""
    gate, up, down = _take_block(pieces(source.headers, found), layer, source, found)
    return Block(layer, (gate, up), down, found, plan, dtype, extras or Extras())


def check_names(tensors: Sequence[OutTensor], config: Any, layers: Sequence[int], folder: object) -> None:
    """Hold names and shapes, outside the MoE blocks, against the host's own model (built without data)."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a shared expert of width 0 is no accident
        model = transformers().AutoModelForCausalLM.from_config(config)
    inside = tuple(f"model.layers.{i}.{part}." for i in layers for part in ("mlp", "block_sparse_moe"))
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith(inside)}
    made = {t.name: t.shape for t in tensors if not t.name.startswith(inside)}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
        made.pop("lm_head.weight", None)
    for name, shape in made.items():
        if name not in wanted:
            _unexpected(folder, name, f"has no place in {config.model_type}", "remove it, or choose another host")
        if wanted[name] != shape:
            _unexpected(folder, name, f"has the shape {list(shape)}, not {list(wanted[name])}", _CHECK_CONFIG)
    for name in wanted:
        if name not in made:
            _unexpected(folder, name, f"is missing, and {config.model_type} needs it", _CHECK_CONFIG)


def _unexpected(folder: object, name: str, detail: str, remedy: str) -> None:
    raise errors.UnexpectedTensor(folder=folder, name=name, detail=detail, remedy=remedy)


def _place(name: str) -> tuple[int, int]:
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdigit():
        return 1, int(parts[2])
    return (0, 0) if "embed_tokens" in name else (2, 0)


def _take_block(named: dict[str, Piece], i: int, source: Source, found: Match) -> tuple[Piece, Piece, Piece]:
    """Gate, up and down of a layer, taken out of ``named``; nothing else may be in its block."""
    prefix = f"{block_name(i)}."
    F, D = found.config.intermediate_size, found.config.hidden_size
    wanted = {f"{prefix}{m}.weight": ((D, F) if m == "down_proj" else (F, D)) for m in MATRICES}
    for name in [name for name in named if name.startswith(prefix)]:
        if name not in wanted:
            remedy = "moepass.convert changes the loaded model instead"
            _unexpected(source.folder, name, f"has no place in the experts of {found.host.model_type}", remedy)
    for name, shape in wanted.items():
        if name not in named:
            _unexpected(source.folder, name, "is missing", _CHECK_CONFIG)
        if named[name].shape != shape:
            _unexpected(
                source.folder, name, f"has the shape {list(named[name].shape)}, not {list(shape)}", _CHECK_CONFIG
            )
    gate, up, down = (named.pop(name) for name in wanted)
    return gate, up, down
