"""``examples/train_ep.py`` under torchrun, resumed with another number of ranks; and a rank that is killed."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import moepass
from moepass import errors
from moepass.parallel import gather, save_checkpoint
from moepass.spec import ExpertSpec, MoESpec

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_ep.py"


@pytest.mark.slow
def test_two_ranks_train_and_one_rank_goes_on_as_if_nothing_had_happened(tmp_path):
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(EXAMPLE), "--out", str(tmp_path), "--steps", "2"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks, 2 steps" in done.stdout
    main = runpy.run_path(str(EXAMPLE))["main"]
    resumed = main(["--out", str(tmp_path), "--steps", "4"])
    alone = main(["--steps", "4"])
    assert resumed == pytest.approx(alone[2:], abs=1e-5)
    assert alone[3] < alone[0]
    assert json.loads((tmp_path / "step-4" / "training.json").read_text()) == {"step": 4}


# --- a rank that dies ------------------------------------------------------------------------------------------------

SPEC = MoESpec(experts=ExpertSpec(num_experts=4, intermediate_size=8, activation="swiglu"))


def build() -> nn.Module:
    torch.manual_seed(0)
    return SPEC.build(8)


def die_in_mid_step(rank: ranks.Rank) -> None:
    mesh = init_device_mesh("cpu", (rank.size,), mesh_dim_names=("ep",))
    model = moepass.parallelize(build(), mesh)
    save_checkpoint(model, rank.folder / "last")
    if rank.number == 1:
        model.router.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    model(torch.randn(4, 8)).sum().backward()


def test_a_killed_rank_ends_the_others_and_the_last_checkpoint_loads(tmp_path):
    start = time.monotonic()
    with ranks.running(ranks.start(__file__, 2, tmp_path)) as (survivor, killed):
        assert killed.wait(timeout=120) == -signal.SIGKILL
        assert survivor.wait(timeout=120) not in (0, None)
    assert time.monotonic() - start < 240
    log = (tmp_path / "log0").read_text()
    assert "onnection" in log, log[-2000:]
    gather(tmp_path / "last", tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in build().state_dict().items())


def test_an_unfinished_checkpoint_is_refused(tmp_path):
    (tmp_path / "step-1.partial").mkdir()
    with pytest.raises(errors.BadCheckpoint, match="was not finished"):
        gather(tmp_path / "step-1.partial", tmp_path / "whole")
    assert not dist.is_initialized()


if __name__ == "__main__":
    ranks.join(die_in_mid_step)
