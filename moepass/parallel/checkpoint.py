"""Distributed checkpoints: every rank writes its part, any number of ranks reads them again.

Contract
    ``save_checkpoint``  a folder of ``torch.distributed.checkpoint``, complete or absent (it appears by rename), with
                         the model's own ``config.json`` and ``moepass.json`` beside it where the model has such
    ``load_checkpoint``  into a model and an optimizer on any mesh: bit for bit, resharded as needed
    Collective over all ranks.  ``parallel.gathering`` puts such a folder together without ranks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from moepass import errors
from moepass.parallel.canonical import canonical, restore
from moepass.parallel.checks import blocks_of
from moepass.upcycle.own.schema import Block, small

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
    state = canonical(model, state)
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
    read = canonical(model, state)
    load_state(read, checkpoint_id=path)
    restore(model, state, read)
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    extra: dict[str, Any] = json.loads((path / EXTRA).read_text())
    return extra


def complete(folder: str | os.PathLike[str]) -> Path:
    """The folder, if it holds a whole checkpoint.  Raises ``BadCheckpoint``."""
    path = Path(folder)
    if not (path / ".metadata").is_file() or not (path / EXTRA).is_file():
        detail = "it is no distributed checkpoint, or one that was not finished"
        raise errors.BadCheckpoint(path=path, reason="incomplete", detail=detail,
                                   remedy="give a folder that moepass.parallel.save_checkpoint wrote")  # fmt: skip
    return path


def _own_files(model: nn.Module) -> dict[str, bytes]:
    """Of a model of transformers its config, and what converted blocks are; nothing of others."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    config = getattr(inner, "config", None)
    blocks = list(blocks_of(inner).values())
    if not hasattr(config, "to_json_string") or any(block.origin is None for block in blocks):
        return {}
    content = json.loads(config.to_json_string())  # type: ignore[union-attr]
    if blocks:
        return small(content, [Block.of(block) for block in blocks])
    made_by = type(inner).__name__.removeprefix("FSDP")  # fully_shard makes a class of its own
    return {"config.json": (json.dumps(content | {"architectures": [made_by]}, indent=2) + "\n").encode()}
