"""The plan of the output: every byte has its place before the first write."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from moepass.errors import BadOption, BadOutTensor
from moepass.upcycle.checkpoint.headers import read_headers
from moepass.upcycle.checkpoint.shards import ALIGNMENT, index_json, plan_shards
from moepass.upcycle.checkpoint.tensors import DTYPES, OutTensor, Verbatim


def out(name: str, shape: tuple[int, ...], dtype: str = "F32") -> OutTensor:
    return OutTensor(name, shape, dtype, Verbatim("x"))


SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)
TENSORS = st.lists(
    st.builds(
        out, st.text(st.characters(codec="utf-8"), min_size=1), SHAPES, st.sampled_from(["F64", "F32", "BF16", "BOOL"])
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda t: t.name,
)


@given(TENSORS, st.integers(1, 200_000))
def test_a_file_is_within_the_limit_unless_one_tensor_is_not(tensors, limit):
    shards = plan_shards(tensors, limit)
    for shard in shards:
        assert shard.nbytes <= limit or len(shard.tensors) == 1
        assert shard.nbytes == len(shard.header) + sum(t.nbytes for t in shard.tensors)
    assert sorted(t.name for s in shards for t in s.tensors) == sorted(t.name for t in tensors)
    assert shards == plan_shards(list(tensors), limit)


@given(TENSORS)
def test_the_header_is_one_that_the_library_and_the_reader_accept(tmp_path_factory, tensors):
    (shard,) = plan_shards(tensors)
    data = shard.header + bytes(shard.nbytes - len(shard.header))
    loaded = load(data)
    assert {n: tuple(t.shape) for n, t in loaded.items()} == {t.name: t.shape for t in tensors}
    path = tmp_path_factory.getbasetemp() / "planned.safetensors"
    path.write_bytes(data)
    found = {h.name: (h.begin, h.end) for h in read_headers(path)}
    places = zip(shard.tensors, shard.offsets, strict=True)
    assert found == {t.name: (begin, begin + t.nbytes) for t, begin in places}


@given(TENSORS)
def test_every_tensor_is_aligned_to_its_element_and_the_data_to_a_block(tensors):
    for shard in plan_shards(tensors, 5000):
        assert len(shard.header) % ALIGNMENT == 0
        for t, offset in zip(shard.tensors, shard.offsets, strict=True):
            assert offset % DTYPES[t.dtype][0] == 0


def test_names_count_the_shards_and_one_shard_has_the_plain_name():
    tensors = [out(f"t{i}", (1000,)) for i in range(3)]
    assert [s.name for s in plan_shards(tensors)] == ["model.safetensors"]
    names = [s.name for s in plan_shards(tensors, 8200)]
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_the_index_tells_sizes_parameters_and_places():
    shards = plan_shards([out("b", (1000,)), out("a", (10, 5), "BF16")], 8150)
    index = json.loads(index_json(shards))
    assert index["metadata"] == {"total_size": 4100, "total_parameters": 1050}
    assert list(index["weight_map"].items()) == [
        ("a", "model-00002-of-00002.safetensors"),
        ("b", "model-00001-of-00002.safetensors"),
    ]


@pytest.mark.parametrize(
    "tensors",
    [
        [out("a", (1,)), out("a", (2,))],
        [out("a", (1,), "F31")],
        [out("a", (-1,))],
        [out("", (1,))],
        [out("__metadata__", (1,))],
    ],
)
def test_impossible_tensors_are_refused(tensors):
    with pytest.raises(BadOutTensor):
        plan_shards(tensors)


@pytest.mark.parametrize("limit", [0, -5, True, 1.5, "5GB"])
def test_a_limit_that_is_no_number_of_bytes_is_refused(limit):
    with pytest.raises(BadOption, match="max_shard_size"):
        plan_shards([out("a", (1,))], limit)


def test_an_empty_plan_is_refused():
    with pytest.raises(BadOption, match="nothing to write"):
        plan_shards([])


def test_tensors_of_one_width_keep_their_order():
    tensors = [out("z", (4,)), out("n", (3,), "BF16"), out("a", (4,))]
    (shard,) = plan_shards(tensors)
    assert [t.name for t in shard.tensors] == ["z", "a", "n"]
    assert torch.equal(load(shard.header + bytes(38))["z"], torch.zeros(4))
