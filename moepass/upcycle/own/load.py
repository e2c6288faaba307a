"""``moepass.load``: a folder in moepass's own format becomes a model.  Each tensor is read once, into its place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moepass import errors
from moepass.nn.moe import MoE
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import DTYPES, Header, dtype_code
from moepass.upcycle.hf.match import transformers
from moepass.upcycle.modules import set_tensor_at, tensor_at
from moepass.upcycle.own.schema import MANIFEST, STEM, read, refuse
from moepass.upcycle.own.skeleton import dense_model, place, tied_names

_CHECK = "restore the files as they were written"


def load(
    folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """The model that ``moepass.save`` or ``moepass upcycle --to moepass`` wrote, in evaluation mode.

    The dense architecture is built without weights, its blocks are exchanged for ``moepass.nn.MoE``, and the tensors of
    the files become its parameters: no second copy.  ``dtype`` casts floating tensors (correction biases stay float32);
    None keeps each as it was saved.
    Raises ``BadMoEFolder``, ``BadCheckpoint``, ``UnexpectedTensor`` (missing, left over or of another shape),
    ``MissingPackage``.
    """
    root = Path(folder)
    if dtype is not None and not dtype.is_floating_point:
        raise errors.BadOption(name="dtype", value=dtype, detail="give a floating dtype, or None")
    model = _filled(skeleton(root, device), Source.open(root, stem=STEM), dtype, device)
    _generation_config(model, root)
    return model


def fill_skeleton(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The model of the folder's config.json and moepass.json with these tensors, by name, for its weights.

    Raises ``BadMoEFolder`` and ``UnexpectedTensor``.
    """
    root = Path(folder)
    return _filled(skeleton(root), in_memory(tensors, root), None, "cpu")


def in_memory(tensors: Mapping[str, Tensor], root: Path) -> Source:
    """Tensors that are in memory as a source; errors name ``root``."""
    headers = {name: _header(name, tensor, root) for name, tensor in tensors.items()}
    return _Memory(root, {}, headers, {}, tensors)


@dataclass(frozen=True)
class _Memory(Source):
    """Tensors that are in memory, read as those of files are."""

    tensors: Mapping[str, Tensor]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        return self.tensors[name] if end is None else self.tensors[name][begin:end]


def _header(name: str, tensor: Tensor, root: Path) -> Header:
    return Header(name, dtype_code(tensor.dtype) or str(tensor.dtype), tuple(tensor.shape), root, 0, tensor.nbytes)


def _filled(model: nn.Module, source: Source, dtype: torch.dtype | None, device: torch.device | str) -> nn.Module:
    """Put the tensors of a source into their places, all of them."""
    groups = tied_names(model)
    check_tensors(model, groups, source.headers, source.folder)
    for names in groups:
        _fill(model, names, source, dtype, device)
    for module in model.modules():
        if isinstance(module, MoE):
            module.router.materialise()  # token counts, which no file holds
    return model


def skeleton(root: Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model of the folder without its weights."""
    config, manifest = read(root)
    return place(dense_model(config, root / "config.json", device), manifest, root / MANIFEST)


def check_tensors(model: nn.Module, groups: list[list[str]], found: Mapping[str, Header], root: Path) -> None:
    """Hold names and shapes against the model, before any of them is read.  Raises ``UnexpectedTensor``."""
    left = dict(found)
    for names in groups:
        there = [left.pop(name) for name in names if name in left]
        if not there:
            _unexpected(root, names[0], "is missing")
        wanted = tuple(tensor_at(model, names[0]).shape)
        for header in there:
            if header.shape != wanted:
                _unexpected(root, header.name, f"has the shape {list(header.shape)}, not {list(wanted)}")
            if header.dtype not in DTYPES or not hasattr(torch, DTYPES[header.dtype][1]):
                _unexpected(root, header.name, f"has the dtype {header.dtype}, which safetensors or this torch lacks")
    for name in left:
        _unexpected(root, name, "has no place in the model")


def _unexpected(root: Path, name: str, detail: str) -> None:
    raise errors.UnexpectedTensor(folder=root, name=name, detail=detail, remedy=_CHECK)


@torch.no_grad()
def _fill(
    model: nn.Module, names: list[str], source: Source, dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Read one tensor and give it to all modules that share it."""
    first, *others = [name for name in names if name in source.headers]
    value = source.read(first)
    for other in others:
        if not torch.equal(source.read(other), value):
            refuse(source.folder, f"{first} and {other} are one tensor in the model and differ here", _CHECK)
    if dtype is not None and value.is_floating_point() and not first.endswith(".router.bias"):
        value = value.to(dtype)
    old = tensor_at(model, names[0])
    new: Tensor = value.to(device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad and new.is_floating_point())
    for name in names:
        set_tensor_at(model, name, new)


def _generation_config(model: nn.Module, root: Path) -> None:
    """As ``from_pretrained``: the file where there is one."""
    if (root / "generation_config.json").is_file():
        model.generation_config = transformers().GenerationConfig.from_pretrained(root, local_files_only=True)
