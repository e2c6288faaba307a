"""A long training run under the compiler, with another number of tokens at every step: nothing may grow or drift.

A small Llama of random weights is converted (``moepass.convert``) and trained on bytes twice, compiled and not, on the
same batches; a second model is trained in the one-line form, so that attached state is watched too.

    losses      those of the compiled run against the uncompiled one's, and how far they are apart at most
    graphs      how often the backend was asked to compile, and when for the last time
    memory      resident bytes at a tenth of the run and at its end
    state       MoE states that hang on dense weights, counted likewise
    resume      a run that is saved in the middle, killed (SIGKILL) and resumed: the same bits at its end

    python -m benchmarks.long_run [--steps 2000] [--inner aot_eager]
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moepass
from benchmarks import common
from moepass import _compat
from moepass.attach import attached_states
from moepass.backend import moepass_backend

#: Sequences of a batch and the lengths that they are cut to: T = BATCH * length, on both sides of the planner's ranges.
BATCH, LENGTHS = 2, (3, 5, 8, 13, 17, 24, 31, 40)
VOCABULARY, WIDTH, LAYERS = 64, 32, 2


class Block(nn.Module):
    """Causal mean over the past, then a SwiGLU block: enough of a language model to learn from."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm, self.gate = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype).unsqueeze(-1)
        x = x + self.mix(x.cumsum(1) / count)
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def batch(step: int) -> Tensor:
    """Ids ``[BATCH, S + 1]`` of a step: runs of a rule (next = 3*id + 1 mod V) with noise; S changes at every step."""
    generator = torch.Generator().manual_seed(step)
    S = LENGTHS[int(torch.randint(len(LENGTHS), (), generator=generator))]
    ids = torch.randint(VOCABULARY, (BATCH, S + 1), generator=generator)
    for i in range(S):
        noisy = torch.rand(BATCH, generator=generator) < 0.1
        ids[:, i + 1] = torch.where(noisy, ids[:, i + 1], (3 * ids[:, i] + 1) % VOCABULARY)
    return ids


class Counter:
    """The backend, counting its compiles and the step of the last one."""

    def __init__(self) -> None:
        self.compiles, self.last, self.step = 0, -1, 0

    def __call__(self, gm: Any, inputs: Any, options: Any = None) -> Any:
        self.compiles, self.last = self.compiles + 1, self.step
        return moepass_backend(gm, inputs, options=options)


@dataclass
class Run:
    """A model with its optimizer, at a step."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    counter: Counter
    step: int = 0

    def train(self, steps: int) -> Iterator[float]:
        """Losses of the steps up to ``steps``."""
        while self.step < steps:
            self.counter.step = self.step
            ids = batch(self.step)
            loss = F.cross_entropy(self.forward(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            yield float(loss.detach())

    def save(self, path: Path) -> None:
        """Everything that a resumed run needs, by rename."""
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        torch.save(parts, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        """Go on from ``save``."""
        parts = torch.load(path, weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.step = int(parts["step"])


def start(form: str, inner: str | None) -> Run:
    """A run of ``form`` (``converted`` or ``one-line``), compiled by ``inner``, or not compiled at all."""
    torch.manual_seed(0)
    model, counter = Model(), Counter()
    if form == "converted":
        moepass.convert(model)
    forward: Callable[[Tensor], Tensor] = model
    if inner is not None:
        forward = torch.compile(model, backend=counter, dynamic=True, options={"inner": inner})
        with torch.no_grad():
            forward(batch(0)[:, :-1])  # the one-line form makes its weights at the first forward
    parameters = list(model.parameters())
    if form == "one-line":
        parameters += list(moepass.moe_parameters(model))
    return Run(model, forward, torch.optim.AdamW(parameters, lr=3e-3), counter)


def resident() -> int:
    """Resident bytes of this process, after a collection."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Watched:
    """A run that was watched: losses, compiles, bytes and states early and at the end."""

    losses: list[float]
    compiles: int
    last_compile: int
    early_bytes: int
    late_bytes: int
    early_states: int
    late_states: int
    seconds: float


def watch(run: Run, steps: int) -> Watched:
    """Train to ``steps``."""
    early_at, early_bytes, early_states, began = max(1, steps // 10), 0, 0, time.perf_counter()
    losses = []
    for loss in run.train(steps):
        losses.append(loss)
        if run.step == early_at:
            early_bytes, early_states = resident(), len(list(attached_states(run.model)))
    late_states = len(list(attached_states(run.model)))
    seconds = time.perf_counter() - began
    counter = run.counter
    return Watched(losses, counter.compiles, counter.last, early_bytes, resident(), early_states, late_states, seconds)


def digest(run: Run) -> list[Tensor]:
    """Every tensor of model and optimizer, to compare bits."""
    state = run.optimizer.state_dict()["state"]
    moments = [v for entry in state.values() for v in entry.values() if isinstance(v, Tensor)]
    return [*(t.clone() for t in run.model.state_dict().values()), *moments]


def resumed_is_equal(steps: int, inner: str, folder: Path) -> bool:
    """A process that is killed after its save in the middle, resumed here, ends with the bits of one in one go."""
    line = [sys.executable, "-m", "benchmarks.long_run", "--part", str(folder), "--steps", str(steps)]
    done = subprocess.run([*line, "--inner", inner], check=False)
    assert done.returncode == -signal.SIGKILL, done.returncode
    whole, resumed = start("converted", inner), start("converted", inner)
    resumed.load(folder / "middle.pt")
    assert resumed.step == steps // 2
    for run in (whole, resumed):
        list(run.train(steps))
    return all(torch.equal(a, b) for a, b in zip(digest(whole), digest(resumed), strict=True))


def part(folder: Path, steps: int, inner: str) -> None:
    """The killed process of ``resumed_is_equal``: to the middle, a save, two more steps, SIGKILL."""
    run = start("converted", inner)
    for _ in run.train(steps):
        if run.step == steps // 2:
            run.save(folder / "middle.pt")
        if run.step == steps // 2 + 2:
            os.kill(os.getpid(), signal.SIGKILL)


def compare(steps: int, inner: str) -> list[dict[str, Any]]:
    """One row for each form: compiled beside uncompiled on the same batches."""
    rows = []
    with _compat.many_recompiles():
        for form in ("converted", "one-line"):
            torch.compiler.reset()
            compiled = watch(start(form, inner), steps)
            plain = watch(start("converted", None), steps)
            apart = [abs(a - b) for a, b in zip(compiled.losses, plain.losses, strict=True)]
            tail = max(1, steps // 20)
            rows.append({
                "form": form,
                "steps": steps,
                "loss at the end": sum(compiled.losses[-tail:]) / tail,
                "uncompiled": sum(plain.losses[-tail:]) / tail,
                "first 20 steps apart": max(apart[:20]),
                "most apart": max(apart),
                "compiles": compiled.compiles,
                "last compile at step": compiled.last_compile,
                "MiB at a tenth": compiled.early_bytes / 2**20,
                "MiB at the end": compiled.late_bytes / 2**20,
                "states at a tenth": compiled.early_states,
                "states at the end": compiled.late_states,
                "seconds": compiled.seconds,
            })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run, compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--inner", default="aot_eager", help="compiler of the rewritten graph")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    parser.add_argument("--part", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part is not None:
        part(args.part, args.steps, args.inner)
        return []
    about = common.machine()
    rows = compare(args.steps, args.inner)
    with tempfile.TemporaryDirectory() as folder:
        equal = resumed_is_equal(args.steps, args.inner, Path(folder))
    for row in rows:
        row["resumed: same bits"] = equal
    notes = [f"inner compiler {args.inner}, AdamW, {BATCH} sequences of {min(LENGTHS)} to {max(LENGTHS)} tokens a step",
             "losses are compared with those of the uncompiled, converted model on the same batches"]  # fmt: skip
    common.write("long_run", rows, title="A long run", notes=notes, about=about, out=args.out)
    return rows


if __name__ == "__main__":
    main()
