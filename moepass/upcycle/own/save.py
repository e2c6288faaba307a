"""``moepass.save``: a model that ``moepass.convert`` has changed becomes a folder in moepass's own format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moepass import errors
from moepass.nn.moe import MoE
from moepass.upcycle.checkpoint.shards import MAX_SHARD_SIZE
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import Computed, OutTensor, dtype_code
from moepass.upcycle.checkpoint.writer import WriteReport, write
from moepass.upcycle.own.schema import STEM, Block, Manifest, small
from moepass.upcycle.own.skeleton import dense_model, place, tied_names


def save(model: nn.Module, folder: str | os.PathLike[str], *, max_shard_size: int = MAX_SHARD_SIZE) -> WriteReport:
    """Write a causal language model of transformers with converted blocks; ``moepass.load`` gives it back bit for bit.

    Parameters, buffers and dtypes are kept; ``requires_grad`` is not, as in ``save_pretrained``.  The folder must be
    new or empty; files appear by rename, config.json last.  Tensors are written from where they are, one at a time.
    Raises ``CannotSave`` for compiled, sharded or other models and for MoE blocks that ``convert`` did not make, and
    ``BadDestination``; nothing is written then.
    """
    _refuse(model)
    blocks = [Block.of(module) for module in model.modules() if isinstance(module, MoE)]
    config = json.loads(model.config.to_json_string())  # type: ignore[operator,union-attr]
    _check(model, config, blocks)
    state = model.state_dict(keep_vars=True)
    tensors = [_out(names[0], state[names[0]]) for names in tied_names(model)]
    files = {**small(config, blocks), **_generation_config(model)}
    nowhere = Source(Path(os.devnull), {}, {}, {})
    return write(folder, tensors, nowhere, files, max_shard_size=max_shard_size, stem=STEM)


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            _cannot(name or type(model).__name__, "it is compiled", "save model._orig_mod")
        if isinstance(module, MoE) and module.origin is None:
            detail = "moepass.convert did not make this block from a dense one, so no architecture says where it goes"
            _cannot(name, detail, "save the state dict, and build the model in code")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or any(base.__name__ == "DTensor" for base in type(tensor).__mro__):
            _cannot(name, f"it is a {type(tensor).__name__}", "gather the full tensors first")
        if tensor.is_meta:
            _cannot(name, "it is on the meta device", "load its weights first")
        if dtype_code(tensor.dtype) is None:
            _cannot(name, f"safetensors has no {tensor.dtype}", "cast it")
    if not any(isinstance(module, MoE) for module in model.modules()):
        _cannot(type(model).__name__, "it has no MoE block", "use save_pretrained, or moepass.convert before")
    if not hasattr(getattr(model, "config", None), "to_json_string"):
        _cannot(type(model).__name__, "it is no model of transformers", "save the state dict, and build it in code")


def _check(model: nn.Module, config: dict[str, Any], blocks: list[Block]) -> None:
    """Build what ``load`` would build, and compare class, names and shapes."""
    where = type(model).__name__
    try:
        built = dense_model(config, Path("config"))
        if type(built) is not type(model):
            detail = f"AutoModelForCausalLM gives {type(built).__name__} for its config"
            _cannot(where, detail, "save the state dict, and build it in code")
        built = place(built, Manifest(moepass_version="", blocks=tuple(blocks)), Path("moepass.json"))
    except errors.BadMoEFolder as error:
        _cannot(where, f"it could not be loaded again: {error}", "call moepass.convert on the whole model")
    ours, theirs = _shapes(model), _shapes(built)
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            detail = f"{name} has the shape {ours.get(name)}, and would have {theirs.get(name)} in the loaded model"
            _cannot(where, detail, "undo changes of the architecture that the config does not know")


def _shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _cannot(where: str, detail: str, remedy: str) -> NoReturn:
    raise errors.CannotSave(where=where, detail=detail, remedy=remedy)


def _out(name: str, tensor: Tensor) -> OutTensor:
    code = dtype_code(tensor.dtype)
    assert code is not None, "_refuse has looked"
    return OutTensor(name, tuple(tensor.shape), code, Computed((), lambda: _here(tensor), "live"))


def _here(tensor: Tensor) -> Tensor:
    """On the CPU; memory of its own only where it comes from another device, or is a view."""
    with torch.no_grad():
        return tensor.detach().cpu().contiguous()


def _generation_config(model: Any) -> dict[str, bytes]:
    settings = getattr(model, "generation_config", None)
    return {} if settings is None else {"generation_config.json": settings.to_json_string().encode()}
