"""``moepass gather``: a distributed checkpoint becomes files for one process, in this process alone.

Contract
    in    a folder of ``save_checkpoint``, written by any number of ranks
    out   a new folder, complete or absent, in the first of these forms that can hold the model:
          a stock MoE of transformers (``from_pretrained``), moepass's own format (``moepass.load``), bare tensors
    Values are kept bit for bit; the whole model is in memory once.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state

from moepass import errors
from moepass.parallel.checkpoint import complete
from moepass.upcycle.checkpoint.shards import MAX_SHARD_SIZE
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.stock import on_disk
from moepass.upcycle.checkpoint.tensors import Computed, OutTensor, dtype_code
from moepass.upcycle.checkpoint.writer import write
from moepass.upcycle.hf.config import config_bytes
from moepass.upcycle.hf.trained import as_host
from moepass.upcycle.own.load import check_tensors, fill_skeleton, in_memory, skeleton
from moepass.upcycle.own.save import save
from moepass.upcycle.own.schema import NAME, is_own, read
from moepass.upcycle.own.skeleton import dense_model, tied_names

#: ``Gathered.form`` of a file without a config.
BARE = "tensors"
_NOWHERE = Source(Path(os.devnull), {}, {}, {})


class Gathered(NamedTuple):
    """What was written.

    ``names``  of the tensors in memory
    ``form``   a ``model_type`` of transformers, ``moepass``, or ``tensors``: names and values without a config
    ``why``    what stands against a form that comes before it, if anything was asked
    """

    names: list[str]
    form: str
    why: str | None = None


def gather(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Gathered:
    """Put a distributed checkpoint's model together, in one process and without ranks.

    ``to``  a MoE ``model_type``, or ``moepass`` for our own format; None: a stock model of transformers as itself; a
            converted one as the first MoE of its family that computes what it computes, else in our own format; any
            other model as ``model.safetensors`` alone
    Raises ``BadCheckpoint``, ``BadDestination``, ``BadOption``; and ``NoHost`` or ``HostRefuses`` for a ``to`` that
    cannot hold the model.
    """
    path = complete(src)
    tensors = _tensors(path)
    if is_own(path):
        return _converted(path, tensors, dst, to, max_shard_size)
    if to is not None:
        detail = "it says how a converted model of transformers is written, and this checkpoint is of another one"
        raise errors.BadOption(name="to", value=to, detail=detail)
    if (path / "config.json").is_file():
        return _stock(path, tensors, dst, max_shard_size)
    write(dst, _out(tensors), _NOWHERE, {}, max_shard_size=max_shard_size)
    return Gathered(sorted(tensors), BARE)


def _converted(
    path: Path, tensors: dict[str, Tensor], dst: str | os.PathLike[str], to: str | None, max_shard_size: int
) -> Gathered:
    why = None
    if to != NAME:
        config, manifest = read(path)
        model = skeleton(path)  # the manifest fits the architecture, and the tensors fit both
        check_tensors(model, tied_names(model), in_memory(tensors, path).headers, path)
        try:
            made = as_host(config, manifest, tensors, path, to)
        except (errors.NoHost, errors.HostRefuses) as error:
            if to is not None:
                raise
            why = str(error)
        else:
            write(dst, made.tensors, _NOWHERE, made.files, max_shard_size=max_shard_size)
            return Gathered(sorted(tensors), made.model_type)
    save(fill_skeleton(path, tensors), dst, max_shard_size=max_shard_size)
    return Gathered(sorted(tensors), NAME, why)


def _stock(path: Path, tensors: dict[str, Tensor], dst: str | os.PathLike[str], max_shard_size: int) -> Gathered:
    """A model of transformers as ``save_pretrained`` would write it; bare where it is no causal language model."""
    config = json.loads((path / "config.json").read_text())
    try:
        model = dense_model(config, path / "config.json")
    except errors.BadMoEFolder as error:
        model, why = None, str(error)
    if model is not None and config.get("architectures") != [type(model).__name__]:
        model, why = None, f"it is a {', '.join(config.get('architectures') or ['model'])}, no causal language model"
    if model is None:
        write(dst, _out(tensors), _NOWHERE, {}, max_shard_size=max_shard_size)
        return Gathered(sorted(tensors), BARE, why)
    groups = tied_names(model)
    check_tensors(model, groups, in_memory(tensors, path).headers, path)
    once = {names[0]: tensors[next(name for name in names if name in tensors)] for names in groups}
    files = {"config.json": config_bytes(config | _dtype(once))}
    write(dst, _out(on_disk(model, once)), _NOWHERE, files, max_shard_size=max_shard_size)
    return Gathered(sorted(tensors), str(config["model_type"]))


def _dtype(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The dtype that ``from_pretrained`` is to load: that of most elements."""
    count: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.numel()
    return {"dtype": str(max(count, key=lambda dtype: count[dtype])).removeprefix("torch.")} if count else {}


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


def _out(tensors: Mapping[str, Tensor]) -> list[OutTensor]:
    return [_one(name, tensor) for name, tensor in tensors.items()]


def _one(name: str, tensor: Tensor) -> OutTensor:
    code = dtype_code(tensor.dtype)
    if code is None:
        detail = f"{name} is {tensor.dtype}, which safetensors does not have"
        raise errors.CannotSave(where="the checkpoint", detail=detail, remedy="cast it before training")
    return OutTensor(name, tuple(tensor.shape), code, Computed((), tensor.contiguous, "live"))
