"""Writing a MoE checkpoint: peak memory and rate, beside ``cp`` of the same bytes on the same disk.

A synthetic Llama-shaped checkpoint (random bfloat16) becomes one with 8 experts per layer, by recipes of
``moepass.upcycle_checkpoint``: ``copy`` (bytes only), ``virtual-groups`` (halves of the matrices, the down projections
scaled), ``noise`` (a draw per element) and ``drop`` (half of the channels redrawn).  Each run of ours is a fresh
process, which reports its peak (VmHWM; what importing moepass alone takes is in the notes) and its time from the call
to the report, planning included.  Sides take turns; every side starts without its target, and its target is removed
after it.  moepass ends when the bytes are on the disk; ``cp`` is given twice, with and without a sync at its end.

With ``--mergekit PATH`` (its ``mergekit-moe``, in an environment of its own) a second table compares whole commands,
starts and imports included: ``moepass upcycle``, and ``mergekit-moe`` with one source for all experts and random gates.

    python -m benchmarks.upcycle_io [--gb 0.2] [--repeats 3] [--folder DIR] [--workers 2] [--recipes copy,drop]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks import common
from moepass.upcycle.checkpoint.memory import use_huge_pages
from moepass.upcycle.checkpoint.source import Source, index_of
from moepass.upcycle.command import upcycle_checkpoint

EXPERTS, VOCABULARY = 8, 8192
RECIPES = ("copy", "virtual-groups", "noise")
#: Small enough that both workers have something to do.
_SHARD = 200_000_000
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def make_source(folder: Path, gigabytes: float, width: int) -> Source:
    """A dense checkpoint of about that size: one file per layer, D = ``width``, F = 2.75 D."""
    D, F = width, width * 11 // 4
    layer = 2 * (4 * D * D + 3 * D * F)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * D) / layer))
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}

    def save(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        made = {n: torch.randn(s, generator=draw).bfloat16() for n, s in shapes.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shapes, file))

    ends: dict[str, tuple[int, ...]] = {f"{name}.weight": (VOCABULARY, D) for name in ("model.embed_tokens", "lm_head")}
    save(1, ends | {"model.norm.weight": (D,)})
    for i in range(layers):
        at = f"model.layers.{i}"
        rest: dict[str, tuple[int, ...]] = {f"{at}.self_attn.{p}_proj.weight": (D, D) for p in "qkvo"}
        rest |= {f"{at}.{p}_layernorm.weight": (D,) for p in ("input", "post_attention")}
        save(i + 2, rest | {f"{at}.mlp.{p}.weight": (D, F) if p == "down_proj" else (F, D) for p in _PROJECTIONS})
    (folder / index_of()).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D, "intermediate_size": F,
        "num_hidden_layers": layers, "num_attention_heads": D // 64, "num_key_value_heads": D // 64,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "tie_word_embeddings": False, "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer(folder)
    return Source.open(folder)


def _tokenizer(folder: Path) -> None:
    """The smallest that mergekit loads."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    content = Tokenizer(WordLevel(words, unk_token="w0"))
    content.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}')


def child(recipe: str, src: Path, dst: Path, workers: int) -> dict[str, float]:
    """One run in this process: seconds without the start, of these before the first write, peak and written bytes."""
    written, writing, start = 0, 0.0, time.perf_counter()
    if recipe != "nothing":
        options: dict[str, Any] = {"experts": EXPERTS, "max_shard_size": _SHARD, "workers": workers}
        report = upcycle_checkpoint(src, dst, init=recipe, **options).written
        assert report is not None  # it is no dry run
        written, writing = report.nbytes, report.seconds
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    return {"peak": peak, "bytes": written, "seconds": seconds, "planning": seconds - writing}


def _spawn(recipe: str, src: Path, dst: Path, workers: int) -> dict[str, float]:
    shutil.rmtree(dst, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.upcycle_io", "--child", recipe, str(src), str(dst), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _command(command: list[str], dst: Path, peaks: list[int]) -> float:
    """Seconds of a whole command; its peak memory joins ``peaks``."""
    shutil.rmtree(dst, ignore_errors=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = process.stderr.read() if process.stderr is not None else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{command[0]} failed: {log[-2000:].decode(errors='replace')}")
    os.sync()
    peaks.append(usage.ru_maxrss * 1024)
    return time.perf_counter() - start


def beside_mergekit(mergekit: Path, src: Path, work: Path, repeats: int) -> dict[str, Any]:
    """One row: whole commands, copies of the source as experts, random routers, everything on the disk at the end."""
    recipe, dst = work / "moe.yaml", work / "whole"
    expert = {"source_model": str(src), "positive_prompts": ["x"]}
    recipe.write_text(json.dumps({"base_model": str(src), "gate_mode": "random", "dtype": "bfloat16",
                                  "experts": [expert] * EXPERTS}))  # fmt: skip
    commands = {
        "moepass": [sys.executable, "-m", "moepass.cli", "upcycle", str(src), str(dst), "--experts", str(EXPERTS)],
        "mergekit": [str(mergekit), str(recipe), str(dst), "--no-write-model-card"],
        "mergekit, lazy": [str(mergekit), str(recipe), str(dst), "--no-write-model-card", "--lazy-unpickle",
                           "--out-shard-size", "1B"],
    }  # fmt: skip
    peaks: dict[str, list[int]] = {name: [] for name in commands}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeats):
        for name in list(commands) if turn % 2 == 0 else list(commands)[::-1]:
            os.sync()
            seconds[name].append(_command(commands[name], dst, peaks[name]))
            shutil.rmtree(dst)
    row: dict[str, Any] = {"recipe": "copy, whole command"}
    for name in commands:
        row[f"{name} [s]"] = common.Timing.of(seconds[name]).median
        row[f"{name} peak [MB]"] = max(peaks[name]) / 1e6
    return row | {"repeats": repeats}


def _copy(src: Path, dst: Path, sync: bool) -> float:
    shutil.rmtree(dst, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(src), str(dst)], check=True)
    if sync:
        subprocess.run(["sync", *map(str, sorted(dst.iterdir()))], check=True)
    return time.perf_counter() - start


def measure(recipe: str, src: Path, work: Path, workers: int, repeats: int) -> dict[str, Any]:
    """One row: medians of turns whose order is reversed every time."""
    ours, reference, theirs = work / "ours", work / "reference", work / "theirs"
    first = _spawn(recipe, src, reference, workers)
    peaks, planning = [first["peak"]], [first["planning"]]

    def our_side() -> float:
        found = _spawn(recipe, src, ours, workers)
        peaks.append(found["peak"])
        planning.append(found["planning"])
        return found["seconds"]

    sides: dict[str, Callable[[], float]] = {
        "moepass": our_side,
        "cp": lambda: _copy(reference, theirs, sync=False),
        "cp, sync": lambda: _copy(reference, theirs, sync=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            os.sync()  # nobody pays for the bytes of another
            seconds[name].append(sides[name]())
            for folder in (ours, theirs):  # room for the next
                shutil.rmtree(folder, ignore_errors=True)
    for folder in (ours, reference, theirs):
        shutil.rmtree(folder, ignore_errors=True)
    median = {name: common.Timing.of(found).median for name, found in seconds.items()}
    gigabytes = first["bytes"] / 1e9
    return {
        "recipe": recipe,
        "output [GB]": gigabytes,
        "peak [MB]": max(peaks) / 1e6,
        **{f"{name} [s]": found for name, found in median.items()},
        "planning [s]": common.Timing.of(planning).median,
        "moepass [GB/s]": gigabytes / median["moepass"],
        "rate / cp": median["cp"] / median["moepass"],
        "rate / cp, sync": median["cp, sync"] / median["moepass"],
        "repeats": repeats,
    }


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.2, help="size of the dense checkpoint")
    parser.add_argument("--width", type=int, default=1024, help="D of the model; 4096 for large checkpoints")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--folder", type=Path, default=None, help="where to work: the disk that is measured")
    parser.add_argument("--mergekit", type=Path, default=None, help="mergekit-moe of another environment")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    about = common.machine()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder)
        source = make_source(work / "source", args.gb, args.width)
        idle = _spawn("nothing", work, work / "none", 1)["peak"]
        rows = [measure(r, source.folder, work, args.workers, args.repeats) for r in args.recipes.split(",")]
        if args.mergekit is not None:
            peer = beside_mergekit(args.mergekit, source.folder, work, args.repeats)
        biggest = max(h.nbytes for h in source.headers.values()) / 1e6
        dense = source.nbytes / 1e9
        free = shutil.disk_usage(work).free / 1e9
    notes = [
        f"dense checkpoint {dense:.2f} GB, D={args.width}, {EXPERTS} experts, largest tensor {biggest:.1f} MB, "
        f"{args.workers} workers; {free:.0f} GB free on the disk",
        f"a process that imports moepass and does nothing peaks at {idle / 1e6:.0f} MB; seconds are those "
        "of the work, without imports",
        "rate / cp: 1 is the speed of cp; moepass's bytes are synced when it ends, those of plain cp are not",
    ]
    title = "Writing upcycled checkpoints: memory and rate"
    if args.mergekit is not None:
        peer_title = "moepass upcycle beside mergekit-moe: whole commands"
        common.write("upcycle_mergekit", [peer], title=peer_title, notes=notes[:1], about=about, out=args.out)
    return common.write("upcycle_io", rows, title=title, notes=notes, about=about, out=args.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        use_huge_pages()  # as the command line does
        print(json.dumps(child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))))
    else:
        main()
