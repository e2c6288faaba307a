"""Fine-tunes of one tiny base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense_zoo import build, saved
from safetensors.torch import load_file, save_file


@pytest.fixture
def fine_tune(tmp_path: Path) -> Callable[..., Path]:
    """``fine_tune(base, name)``: a copy of the base; tensors whose name holds one of ``parts`` moved (none: equal)."""

    def make(base: Path, name: str, parts: tuple[str, ...] = ("",)) -> Path:
        folder = tmp_path / name
        shutil.copytree(base, folder)
        tensors = load_file(folder / "model.safetensors")
        draw = torch.Generator().manual_seed(sum(name.encode()))
        for key, value in tensors.items():
            if any(part in key for part in parts):
                tensors[key] = value + 0.1 * torch.randn(value.shape, generator=draw).to(value)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture(scope="session")
def half() -> Path:
    """A base in bfloat16."""
    folder = saved("qwen3").parent / "half"
    if not folder.exists():
        build("qwen3", dtype=torch.bfloat16).save_pretrained(folder)
    return folder
