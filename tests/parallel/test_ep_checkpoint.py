"""A converted model of transformers: distributed checkpoint to own format, and own format straight onto ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig

import moepass
from moepass import errors
from moepass.parallel import gather, load, save_checkpoint


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    built = AutoModelForCausalLM.from_config(config).eval()
    moepass.convert(built)
    return built


@pytest.fixture
def join(tmp_path):
    """Join a group; it is left at the end."""

    def joined(backend: str, rank: int, size: int):
        store = FakeStore() if backend == "fake" else dist.FileStore(str(tmp_path / "store"), size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        return init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))

    yield joined
    dist.destroy_process_group()


def test_a_gathered_checkpoint_loads_as_the_converted_model(model, join, tmp_path):
    ids = torch.arange(6)[None]
    wanted, state = model(input_ids=ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    moepass.parallelize(model, join("gloo", 0, 1))
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)
    save_checkpoint(model, tmp_path / "distributed")
    with pytest.raises(errors.BadDestination, match="there already"):
        save_checkpoint(model, tmp_path / "distributed")
    gather(tmp_path / "distributed", tmp_path / "own", to="moepass")
    again = moepass.load(tmp_path / "own")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())
    torch.testing.assert_close(again(input_ids=ids).logits, wanted)


def test_each_rank_reads_its_own_experts_and_nothing_of_the_others(model, join, tmp_path, monkeypatch):
    moepass.save(model, tmp_path / "own")
    from moepass.upcycle.checkpoint.source import Source

    read, sizes = Source.read, {}
    monkeypatch.setattr(Source, "read", lambda self, name, *rows: sizes.setdefault(name, read(self, name, *rows)))
    sharded = load(tmp_path / "own", join("fake", 3, 4))
    found = 0
    for name, tensor in sharded.state_dict().items():
        wanted = model.state_dict()[name]
        if isinstance(tensor, DTensor):
            found += 1
            rows = wanted.shape[0] // 4
            assert torch.equal(tensor.to_local(), wanted[3 * rows :])
            assert sizes[name].shape[0] == rows
        else:
            assert torch.equal(tensor, wanted)
    assert found == 2 * len([m for m in model.modules() if isinstance(m, moepass.nn.MoE)])


def test_each_rank_reads_its_slices_of_its_experts(model, join, tmp_path):
    """Rank 5 of (ep=4, tp=2): the third pair of experts, the second half of F."""
    moepass.save(model, tmp_path / "own")
    join("fake", 5, 8)
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("ep", "tp"))
    sharded = load(tmp_path / "own", mesh, tp="tp")
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, moepass.nn.MoE)}
    assert blocks
    for name, block in blocks.items():
        ours, (E, rows, D) = sharded.get_submodule(name), block.w_in.shape
        F, own = rows // 2, slice(2 * E // 4, 3 * E // 4)
        gate_up = block.w_in.detach().view(E, 2, F, D)[own, :, F // 2 :]
        assert torch.equal(ours.w_in.to_local(), gate_up), "the same rows of gate and up"
        assert torch.equal(ours.w_out.to_local(), block.w_out.detach()[own, :, F // 2 :])
