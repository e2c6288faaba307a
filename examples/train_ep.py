"""Convert a dense model, share its experts out over ranks, train, checkpoint, and resume with another number of ranks.

A byte-level model learns a few lines of text.  Every rank has its part of the batch and of the experts; the batch as a
whole does not depend on the number of ranks, so neither do the losses.

    torchrun --nproc-per-node 2 examples/train_ep.py --out run --steps 20
    torchrun --nproc-per-node 4 examples/train_ep.py --out run --steps 40      # goes on from step 20
    moepass gather run/step-40 gathered                                        # one file, for one process
"""

from __future__ import annotations

import argparse
import os
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import moepass
from moepass.parallel import average_gradients, clip_grad_norm_, load_checkpoint, save_checkpoint
from moepass.spec import ExpertSpec, LossSpec, MoESpec, RouterSpec

D, WIDTH, LENGTH, BATCH = 32, 64, 32, 8
TEXT = torch.tensor(list((__doc__ or "").encode())).repeat(4)


class Block(nn.Module):
    """Something that mixes neighbours, and a dense feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.GRU(D, D, batch_first=True)
        self.up, self.down = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, D] -> [B, S, D]``."""
        x = x + self.mix(F.layer_norm(x, (D,)))[0]
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (D,)))))


class Model(nn.Module):
    """Next-byte logits."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, D)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(D, 256)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, S] -> [B, S, 256]``."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build() -> nn.Module:
    """Dense, then converted: 8 experts that start as copies of parts of the dense block."""
    torch.manual_seed(0)
    spec = MoESpec(
        router=RouterSpec(top_k=2),
        experts=ExpertSpec(num_experts=8),
        losses=LossSpec(load_balance="megatron", load_balance_weight=0.01, scope="global"),
    )
    model = Model()
    moepass.convert(model, spec)
    return model


def batch(step: int) -> Tensor:
    """All ranks' windows of this step, ``[BATCH, LENGTH + 1]``."""
    starts = torch.randint(len(TEXT) - LENGTH - 1, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([TEXT[s : s + LENGTH + 1] for s in starts.tolist()])


def join() -> None:
    """The group that torchrun describes, or one of this process alone."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def newest(folder: Path) -> Path | None:
    """The checkpoint of the most steps."""
    found = [path for path in folder.glob("step-*") if path.suffix != ".partial"]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def train(folder: Path, steps: int) -> list[float]:
    """From the newest checkpoint, or from the start, to ``steps``; the mean loss over ranks at every step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    model = moepass.parallelize(build(), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    last = newest(folder)
    first = 0 if last is None else int(load_checkpoint(model, last, optimizer)["step"])
    losses = []
    for step in range(first, steps):
        ids = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        average_gradients(model, mesh)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    if losses:
        save_checkpoint(model, folder / f"step-{steps}", optimizer, {"step": steps})
    return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train; returns the losses of the steps that were made."""
    parser = argparse.ArgumentParser(description=textwrap.shorten(__doc__ or "", 100))
    parser.add_argument("--steps", type=int, default=20, help="in all, those of earlier runs included")
    parser.add_argument("--out", type=Path, help="folder of the checkpoints; a temporary one by default")
    args = parser.parse_args(argv)
    join()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            losses = train(args.out or Path(scratch), args.steps)
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} ranks, {len(losses)} steps, losses:", *(f"{x:.6f}" for x in losses))
    finally:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
