"""Opening a checkpoint: what the library wrote is found byte by byte, and every kind of damage is refused by name."""

from __future__ import annotations

import json
import math
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from moepass.errors import BadCheckpoint
from moepass.upcycle.checkpoint.headers import MAX_HEADER, read_headers
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.checkpoint.tensors import DTYPES

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"


def refusal(folder) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        Source.open(folder)
    assert str(caught.value.fields["path"]) in str(caught.value)
    assert caught.value.fields["remedy"]
    return caught.value.fields["reason"]


def build(header: object, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, dtype: str = "F32", shape: list | None = None) -> dict:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def edit_index(folder, change) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_every_tensor_reads_as_the_library_reads_it(layout, request):
    folder = request.getfixturevalue(layout)
    source = Source.open(folder)
    expected = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    assert set(source.headers) == set(expected)
    for name, tensor in expected.items():
        header = source.headers[name]
        assert torch.equal(source.read(name), tensor)
        assert source.read(name).dtype == tensor.dtype
        assert header.shape == tuple(tensor.shape)
        raw = header.file.read_bytes()[header.begin : header.end]
        assert raw == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert source.config == {"model_type": "llama"}
    assert source.nbytes == sum(t.nbytes for t in expected.values())


def test_every_dtype_of_the_table_has_the_librarys_code_and_size(tmp_path):
    for code, (width, name) in DTYPES.items():
        dtype = getattr(torch, name)
        save_file({"x": torch.zeros(3, dtype=torch.uint8).to(dtype)}, tmp_path / "x.safetensors")
        (header,) = read_headers(tmp_path / "x.safetensors")
        assert (header.dtype, header.nbytes) == (code, 3 * width)


def test_empty_tensors_and_scalars_have_their_place(tmp_path):
    made = {"a.x": torch.zeros(0, 4), "b.x": torch.tensor(3.0), "c.x": torch.ones(2, 0, 3)}
    save_file(made, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = Source.open(tmp_path)
    for name, tensor in made.items():
        assert torch.equal(source.read(name), tensor)
        assert source.read(name).shape == tensor.shape


GOOD = entry(0, 8)
DAMAGE = {
    "truncated": [
        b"",
        b"\x10\x00",
        build({"a": GOOD}, b"\0" * 7),
        build({"a": GOOD}, b"\0" * 8, length=10_000),
        build({"a": GOOD}, b""),
    ],
    "header_length": [struct.pack("<Q", MAX_HEADER + 1), struct.pack("<Q", 2**63)],
    "git_lfs": [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n"],
    "header_json": [
        build(b"not json", b""),
        build(b"[1]", b""),
        build(b"\xff\xfe", b""),
        build(b"[" * 100_000, b""),
        build({"a": [1]}, b"\0" * 8),
        build({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
        build({"a": entry(0, 8, shape=[-2])}, b"\0" * 8),
        build({"a": entry(0, 8, shape=[2.0])}, b"\0" * 8),
        build({"a": entry(0, 8, shape=[True, 2])}, b"\0" * 8),
        build({"a": GOOD | {"data_offsets": [0]}}, b"\0" * 8),
        build({"a": GOOD | {"data_offsets": [-8, 0]}}, b"\0" * 8),
    ],
    "size": [
        build({"a": entry(0, 8, shape=[3])}, b"\0" * 8),
        build({"a": entry(0, 8, "F64", [2])}, b"\0" * 8),
        build({"a": entry(8, 0, shape=[2])}, b"\0" * 8),
        build({"a": entry(0, 8, shape=[2**40, 2**40])}, b"\0" * 8),
    ],
    "dtype": [build({"a": entry(0, 8, "F31", [2])}, b"\0" * 8), build({"a": entry(0, 8, None, [2])}, b"\0" * 8)],
    "overlap": [build({"a": GOOD, "b": entry(4, 12)}, b"\0" * 12), build({"a": GOOD, "b": GOOD}, b"\0" * 8)],
    "hole": [build({"a": GOOD, "b": entry(12, 16)}, b"\0" * 16), build({"a": entry(4, 8)}, b"\0" * 8)],
    "trailing": [build({"a": GOOD}, b"\0" * 9)],
    "duplicate": [build(b'{"a":%b,"a":%b}' % ((json.dumps(GOOD).encode(),) * 2), b"\0" * 8)],
}
CASES = [(reason, i) for reason, files in DAMAGE.items() for i in range(len(files))]


@pytest.mark.parametrize(("reason", "case"), CASES)
def test_a_damaged_file_is_refused_by_name(tmp_path, reason, case):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(DAMAGE[reason][case])
    assert refusal(tmp_path) == reason


@settings(max_examples=150)
@given(st.data())
def test_a_mutated_file_is_refused_or_read_as_the_library_reads_it(tmp_path_factory, data):
    whole = bytearray(save({"a": torch.arange(4.0), "b": torch.ones(3, dtype=torch.bfloat16)}))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(
            st.sampled_from(list(b'\0\x01\xff019[]{}",:sab FB'))
        )
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(bytes(whole[: data.draw(st.integers(len(whole) - 3, len(whole)))]))
    try:
        headers = read_headers(path)
    except BadCheckpoint:
        return
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {h.name for h in headers}
        for h in headers:
            raw = path.read_bytes()[h.begin : h.end]
            assert file.get_tensor(h.name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == raw
            assert math.prod(h.shape) * DTYPES[h.dtype][0] == len(raw)


def _read_by_the_library(path) -> None:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 -- not a dict
            file.get_tensor(name)


@pytest.mark.parametrize(("reason", "case"), [c for c in CASES if c[0] != "duplicate"])
def test_what_we_refuse_the_library_refuses_too(tmp_path, reason, case):
    """All but a name that stands twice, of which the library takes the last."""
    (tmp_path / "x.safetensors").write_bytes(DAMAGE[reason][case])
    with pytest.raises((SafetensorError, OSError, ValueError)):
        _read_by_the_library(tmp_path / "x.safetensors")


def test_an_index_that_names_a_missing_shard_is_refused(sharded):
    (sharded / SECOND).unlink()
    assert refusal(sharded) == "missing_shard"


def test_an_index_that_names_a_file_no_folder_can_hold_is_refused(sharded):
    """Found by fuzzing: the operating system refuses to look for it."""
    edit_index(sharded, lambda weights: weights.update({next(iter(weights)): "x" * 5000}))
    assert refusal(sharded) == "missing_shard"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.__setitem__("ghost.weight", SECOND),
        lambda m: m.__setitem__(next(iter(m)), SECOND),
        lambda m: m.pop(next(iter(m))),
        lambda m: m.__setitem__(next(iter(m)), 7),
        lambda m: m.clear(),
    ],
    ids=["a tensor that is not there", "the wrong shard", "an unlisted tensor", "no file name", "empty"],
)
def test_an_index_that_lies_is_refused(sharded, change):
    edit_index(sharded, change)
    assert refusal(sharded) == "index"


@pytest.mark.parametrize("file", ["../other.safetensors", "a/../../x.safetensors", "/etc/passwd", "C:\\x", "..\\x"])
def test_an_index_that_leaves_the_folder_is_refused_before_anything_is_opened(sharded, file):
    edit_index(sharded, lambda m: m.__setitem__(next(iter(m)), file))
    assert refusal(sharded) == "path_escape"


def test_a_link_out_of_the_folder_is_refused(single, tmp_path):
    (single / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (single / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert refusal(single) == "path_escape"


def test_the_links_of_the_hubs_cache_are_followed(single, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (single / name).rename(blobs / f"sha-{name}")
        (snapshot / name).symlink_to(os.path.join("..", "..", "blobs", f"sha-{name}"))
    assert len(Source.open(snapshot).headers) == 10


def test_the_same_tensor_in_two_shards_is_refused(sharded):
    first = load_file(sharded / "model-00001-of-00002.safetensors")
    save_file(load_file(sharded / SECOND) | {next(iter(first)): next(iter(first.values()))}, sharded / SECOND)
    assert refusal(sharded) == "duplicate"


def test_shards_without_an_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    assert refusal(sharded) == "no_index"


def test_pickled_weights_are_refused_with_the_way_to_resave_them(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match=r"save_pretrained\('NEW'\)") as caught:
        Source.open(single)
    assert caught.value.fields["reason"] == "pickled"


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantised_config_is_refused(single, field, nested):
    part = {field: {"quant_method": "gptq", "bits": 4}}
    (single / "config.json").write_text(json.dumps({"text_config": part} if nested else part))
    assert refusal(single) == "quantised"


def test_an_empty_quantisation_config_says_nothing(single):
    (single / "config.json").write_text('{"quantization_config": null}')
    assert Source.open(single).headers


@pytest.mark.parametrize(
    "name",
    [
        "q_proj.qweight",
        "q_proj.g_idx",
        "q_proj.SCB",
        "q_proj.weight_scale_inv",
        "q_proj.weight.absmax",
        "q.weight_packed",
    ],
)
def test_tensors_of_quantisers_are_refused_even_if_the_config_is_silent(tmp_path, name):
    save_file({f"model.layers.0.{name}": torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path) == "quantised"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_weights_of_no_floating_dtype_are_refused(tmp_path, dtype):
    save_file({"q_proj.weight": torch.ones(4).to(dtype)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path) == "quantised"


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, single):
    assert refusal(tmp_path / "nowhere") == "no_folder"
    assert refusal(tmp_path) == "missing"
    (single / "config.json").write_text("{")
    assert refusal(single) == "json"
    (single / "config.json").write_text("[]")
    assert refusal(single) == "json"
    (single / "config.json").write_text("{}")
    (single / "model.safetensors").unlink()
    assert refusal(single) == "no_weights"


def test_a_pipe_or_a_folder_in_place_of_a_shard_is_refused_without_waiting(single):
    (single / "model.safetensors").unlink()
    os.mkfifo(single / "model.safetensors")
    assert refusal(single) == "not_a_file"
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").mkdir()
    assert refusal(single) == "not_a_file"


def test_a_source_that_changes_after_opening_is_noticed(single):
    source = Source.open(single)
    source.check_unchanged()
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadCheckpoint, match="changed"):
        source.check_unchanged()
    last = max(source.headers.values(), key=lambda h: h.end)
    with pytest.raises(BadCheckpoint, match="changed"):
        source.read(last.name)
