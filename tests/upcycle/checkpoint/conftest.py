"""Small checkpoints on disk, written by the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


def tensors() -> dict[str, torch.Tensor]:
    """Names in the order of a model; odd sizes, so that nothing is aligned by luck."""
    draw = torch.Generator().manual_seed(0)
    made = {"model.embed_tokens.weight": torch.randn(11, 6, generator=draw)}
    for i in range(3):
        made[f"model.layers.{i}.mlp.up_proj.weight"] = torch.randn(10, 6, generator=draw).bfloat16()
        made[f"model.layers.{i}.mlp.down_proj.weight"] = torch.randn(6, 10, generator=draw).bfloat16()
        made[f"model.layers.{i}.norm.weight"] = torch.randn(7, generator=draw).half()
    return made


def write_folder(folder: Path, parts: list[dict[str, torch.Tensor]], config: dict | None = None) -> Path:
    """A folder with one file, or with shards and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if len(parts) == 1:
        save_file(parts[0], folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "single", [tensors()])


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    items = list(tensors().items())
    return write_folder(tmp_path / "sharded", [dict(items[:4]), dict(items[4:])])
