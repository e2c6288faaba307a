"""Distributed checkpoints: every rank writes its part, any number of ranks reads them again, one process gathers them.

Contract
    ``save_checkpoint``  a folder of ``torch.distributed.checkpoint``, complete or absent (it appears by rename), with
                         the model's own ``config.json`` and ``moepass.json`` beside it where the model has such
    ``load_checkpoint``  into a model and an optimizer on any mesh: bit for bit, resharded as needed
    ``gather``           without ranks: the folder becomes what ``moepass.load`` reads, or one ``model.safetensors``
    The first two are collective over all ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from moepass import errors
from moepass.parallel.checks import blocks_of
from moepass.upcycle.checkpoint.shards import MAX_SHARD_SIZE
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import Computed, OutTensor, dtype_code
from moepass.upcycle.checkpoint.writer import write
from moepass.upcycle.own.load import fill_skeleton
from moepass.upcycle.own.save import save
from moepass.upcycle.own.schema import Block, is_own, small

#: What the caller gave to remember, as JSON.
EXTRA = "training.json"


def save_checkpoint(
    model: nn.Module,
    folder: str | os.PathLike[str],
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write model, optimizer and ``extra`` (JSON values: the step, say) to a new folder.  Raises ``BadDestination``."""
    path = Path(folder)
    partial = path.with_name(path.name + ".partial")
    if path.exists():
        raise errors.BadDestination(path=path, reason="exists", detail="it is there already",
                                    remedy="give another folder, or remove it first")  # fmt: skip
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    dist.barrier()  # nobody writes before everybody has looked
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    dist.barrier()
    save_state(state, checkpoint_id=partial)
    if dist.get_rank() == 0:
        for name, content in {**_own_files(model), EXTRA: json.dumps(dict(extra or {})).encode()}.items():
            (partial / name).write_bytes(content)
        partial.rename(path)
    dist.barrier()


def load_checkpoint(
    model: nn.Module, folder: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Read a checkpoint into a model, and an optimizer of it; returns ``extra``.  Raises ``BadCheckpoint``."""
    path = complete(folder)
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    load_state(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    extra: dict[str, Any] = json.loads((path / EXTRA).read_text())
    return extra


def gather(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], *, max_shard_size: int = MAX_SHARD_SIZE
) -> list[str]:
    """Put a distributed checkpoint's model together, in one process and without ranks; the names of its tensors.

    A converted model of transformers becomes a folder in moepass's own format (``moepass.load``), any other model
    ``model.safetensors``.  Values and dtypes are kept bit for bit.  The whole model is in memory once.
    Raises ``BadCheckpoint`` and ``BadDestination``.
    """
    path = complete(src)
    tensors = _tensors(path)
    if is_own(path):
        save(fill_skeleton(path, tensors), dst, max_shard_size=max_shard_size)
        return sorted(tensors)
    planned = [_out(name, tensor) for name, tensor in tensors.items()]
    write(dst, planned, Source(Path(os.devnull), {}, {}, {}), {}, max_shard_size=max_shard_size)
    return sorted(tensors)


def complete(folder: str | os.PathLike[str]) -> Path:
    """The folder, if it holds a whole checkpoint.  Raises ``BadCheckpoint``."""
    path = Path(folder)
    if not (path / ".metadata").is_file() or not (path / EXTRA).is_file():
        detail = "it is no distributed checkpoint, or one that was not finished"
        raise errors.BadCheckpoint(path=path, reason="incomplete", detail=detail,
                                   remedy="give a folder that moepass.parallel.save_checkpoint wrote")  # fmt: skip
    return path


def _tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the model, whole."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = "model."
    whole = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix)
    }
    state = {"model": {name.removeprefix(prefix): tensor for name, tensor in whole.items()}}
    with warnings.catch_warnings():  # that no process group is there is the point
        warnings.simplefilter("ignore", UserWarning)
        load_state(state, checkpoint_id=path, no_dist=True)
    return state["model"]


def _out(name: str, tensor: Tensor) -> OutTensor:
    code = dtype_code(tensor.dtype)
    if code is None:
        detail = f"{name} is {tensor.dtype}, which safetensors does not have"
        raise errors.CannotSave(where="the checkpoint", detail=detail, remedy="cast it before training")
    return OutTensor(name, tuple(tensor.shape), code, Computed((), lambda: tensor, "live"))


def _own_files(model: nn.Module) -> dict[str, bytes]:
    """config.json and moepass.json of a converted model of transformers; none of others."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    config = getattr(inner, "config", None)
    blocks = list(blocks_of(inner).values())
    if not hasattr(config, "to_json_string") or any(block.origin is None for block in blocks):
        return {}
    return small(json.loads(config.to_json_string()), [Block.of(block) for block in blocks])  # type: ignore[union-attr]
