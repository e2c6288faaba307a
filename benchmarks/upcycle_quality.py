"""What upcycling does to quality: a small language model trained on as dense model and as several MoEs.

A byte-level Llama is pre-trained on Python's own standard library; from that checkpoint every arm sees the same batches
in the same order.  A seed decides that order, the routers and what is redrawn; the dense checkpoint is one.  Reported:
held-out loss at the end, the bump (the highest loss above step 0's in the first 200 steps), and what a token costs.

    python -m benchmarks.upcycle_quality [--arms all] [--seeds 3] [--steps 1000] [--work DIR]

``--arms``: names, ``main`` (the recipes), ``candidates`` (remedies for the bump), ``all``.  With ``--work`` the dense
checkpoint and every finished run are kept there and found again; ``--saved`` reports those and trains nothing.  The
chart needs matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moepass
from benchmarks import common
from benchmarks.quality import report
from benchmarks.quality.arms import ARMS, CANDIDATES, MAIN, Arm, build
from benchmarks.quality.training import Corpus, Setup, fresh_model, read_corpus, train


def pretrained(setup: Setup, corpus: Corpus, work: Path | None) -> nn.Module:
    """The dense checkpoint that all arms start from: constant learning rate, not annealed."""
    model = fresh_model(setup, seed=0)
    path = None if work is None else work / f"dense-{key(setup, 'steps')}.pt"
    if path is not None and path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    start = time.perf_counter()
    curve = train(model, corpus, setup, seed=10_000, steps=setup.pretrain, warmup=setup.warmup, decay=False)
    print(f"dense pre-training: {curve.final:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    if path is not None:
        torch.save(model.state_dict(), path)
    return model


def key(setup: Setup, *without: str) -> str:
    """Names what was trained, for files: a run of another size is never taken for this one."""
    fields = {name: value for name, value in dataclasses.asdict(setup).items() if name not in without}
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:8]


def ffn_flops(model: Any) -> int:
    """FLOPs of a token in the feed-forward blocks, forward and backward, routers included."""
    return sum(moepass.nn.count(layer.mlp).flops_per_token() for layer in model.model.layers)


def flops(model: nn.Module, setup: Setup) -> int:
    """FLOPs of a token in the whole model, attention scores included."""
    return moepass.nn.count(model).flops_per_token(setup.length)


def run(name: str, arm: Arm, dense: nn.Module, corpus: Corpus, setup: Setup, seed: int) -> dict[str, Any]:
    """Train one arm with one seed."""
    steps = setup.steps
    if arm.longer:
        richer = build(MAIN["copy"], dense, setup, seed)
        steps = round(steps * flops(richer, setup) / flops(dense, setup))
    model = build(arm, dense, setup, seed)
    curve = train(
        model,
        corpus,
        setup,
        seed=seed,
        steps=steps,
        router_rate=arm.router_rate,
        warmup=setup.warmup,
        granularity=arm.granularity,
    )
    return {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "ffn_flops": ffn_flops(model),
        "flops": flops(model, setup),
        "parameters": moepass.nn.count(model).num_params,
        **dataclasses.asdict(curve),
    }


def measure(
    names: Sequence[str], seeds: int, setup: Setup, corpus: Corpus, work: Path | None, *, saved: bool = False
) -> list[dict[str, Any]]:
    """All runs, seed by seed, so that an interrupted experiment has whole seeds; ``saved``: finished ones only."""
    dense = pretrained(setup, corpus, work)
    runs = []
    for seed in range(seeds):
        for name in names:
            path = None if work is None else work / f"{name}-{seed}-{key(setup)}.json"
            if path is not None and path.exists():
                runs.append(json.loads(path.read_text()))
                continue
            if saved:
                continue
            start = time.perf_counter()
            done = run(name, ARMS[name], dense, corpus, setup, seed)
            done = json.loads(json.dumps(done))  # steps become text, as in a file
            if path is not None:
                path.write_text(json.dumps(done))
            runs.append(done)
            print(f"{name:15s} seed {seed}: {report.line(done)}, {time.perf_counter() - start:.0f} s", flush=True)
    return runs


def arm_names(text: str) -> list[str]:
    """``main``, ``candidates``, ``all`` or names, comma separated."""
    sets = {"main": MAIN, "candidates": CANDIDATES, "all": ARMS}
    names = [name for part in text.split(",") for name in sets.get(part, [part])]
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise SystemExit(f"unknown arms {', '.join(unknown)}; there are {', '.join(ARMS)}")
    return list(dict.fromkeys(names))


def main(argv: Sequence[str] | None = None) -> Path:
    """Train all arms and write the results."""
    default = Setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="main")
    parser.add_argument("--seeds", "--repeats", type=int, default=3)
    parser.add_argument("--pretrain", type=int, default=default.pretrain, help="dense steps before the arms part")
    parser.add_argument("--steps", type=int, default=default.steps, help="steps of every arm")
    parser.add_argument("--width", type=int, default=default.width, help="model width D; F is four times that")
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--windows", type=int, default=default.final_windows, help="held-out windows for the last loss")
    parser.add_argument("--work", type=Path, default=None, help="where checkpoint and finished runs are kept")
    parser.add_argument("--saved", action="store_true", help="report the finished runs of --work; train nothing")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    setup = Setup(
        width=args.width,
        hidden=4 * args.width,
        batch=args.batch,
        pretrain=args.pretrain,
        steps=args.steps,
        curve_windows=min(default.curve_windows, args.windows),
        final_windows=args.windows,
    )
    names, about = arm_names(args.arms), common.machine()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(setup)
    runs = measure(names, args.seeds, setup, corpus, args.work, saved=args.saved)
    said = ("arms", "seeds", "width", "batch", "pretrain", "steps")
    command = " ".join(("python -m benchmarks.upcycle_quality", *(f"--{name} {vars(args)[name]}" for name in said)))
    return report.write(runs, setup, corpus, command=command, about=about, out=args.out)


if __name__ == "__main__":
    main()
