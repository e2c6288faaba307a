"""Random headers and indices of safetensors folders: opened with every byte in its folder, or refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import fuzzing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from moepass.errors import BadCheckpoint
from moepass.upcycle.checkpoint.headers import read_headers
from moepass.upcycle.checkpoint.source import Source

SHARDS = ["model-1.safetensors", "model-2.safetensors"]
FILES = st.one_of(
    st.sampled_from([
        *SHARDS, "../outside.safetensors", "/etc/passwd", "a/../model-1.safetensors", "./model-1.safetensors", ".", "",
        "model-1.safetensors\0", "C:\\x", "~/x", "sub/model-1.safetensors", "x" * 300, "\ud800", "config.json", "loop",
    ]),
    st.text(max_size=12),
)  # fmt: skip
NAMES = st.one_of(
    st.sampled_from(["a.weight", "b.weight", "c.weight", "d.weight", "\ud800", "x" * 5000]), st.text(max_size=9)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**66), 2**66) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two sound shards, a link that leaves the folder, one that goes in a circle."""
    root = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    root.mkdir()
    (root / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(2), "b.weight": torch.ones(3)}, root / SHARDS[0])
    save_file({"c.weight": torch.ones(1)}, root / SHARDS[1])
    save_file({"d.weight": torch.ones(1)}, root.parent / "outside.safetensors")
    (root / "loop").symlink_to(root / "loop")
    return root


def opened(folder: Path) -> Source | None:
    """The checkpoint, or None where it was refused as one."""
    try:
        return Source.open(folder)
    except BadCheckpoint:
        return None


SOUND = {"a.weight": SHARDS[0], "b.weight": SHARDS[0], "c.weight": SHARDS[1]}


@fuzzing.inputs(120)
@given(data=st.data())
def test_an_index_opens_files_of_its_folder_only(folder, data):
    weight_map = dict(SOUND) if data.draw(st.booleans()) else {}
    weight_map.update(data.draw(st.dictionaries(NAMES, FILES, max_size=3)))
    content = {"weight_map": weight_map} if data.draw(st.integers(0, 9)) else data.draw(JSON)
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    source = opened(folder)
    fuzzing.tried["index files"] += 1
    if source is not None:
        fuzzing.tried["of them opened"] += 1
        assert all(h.file.resolve().is_relative_to(folder.resolve()) for h in source.headers.values())
        assert all(source.read(name).shape == h.shape for name, h in source.headers.items())


@st.composite
def entries(draw) -> dict:
    """Entries of a header: mostly sound ones side by side, some damaged."""
    made, position = {}, 0
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = 4 * int(torch.tensor(shape, dtype=torch.int64).prod()) if shape else 4
        made[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    for name in list(made):
        if draw(st.integers(0, 5)) == 0:
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            made[name][field] = draw(JSON)
        elif draw(st.integers(0, 12)) == 0:
            made[name] = draw(JSON)
    return made


@fuzzing.inputs(120)
@given(header=entries(), more=st.binary(max_size=6), length=st.none() | st.integers(0, 2**64 - 1))
def test_a_header_is_read_within_its_file_or_refused(tmp_path_factory, header, more, length):
    text = json.dumps(header).encode()
    ends = [e["data_offsets"][1] for e in header.values() if isinstance(e, dict) and _is_range(e.get("data_offsets"))]
    data = bytes(max(0, min(max(ends, default=0), 1000))) + more
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    fuzzing.tried["safetensors headers"] += 1
    try:
        found = read_headers(path)
    except BadCheckpoint:
        return
    fuzzing.tried["of them read"] += 1
    size = path.stat().st_size
    assert all(0 <= h.begin <= h.end <= size for h in found)
    assert {h.name for h in found} == set(header) - {"__metadata__"}


def _is_range(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)
