"""MoE kernels on an accelerator: right first, then TFLOP/s, share of the roofline, and the ratio to every peer.

One command, bounded by ``--minutes``: it checks every side against ``moepass.reference`` in float64, measures this
machine's own ceilings (a large bfloat16 GEMM, a large copy), and times forward, and forward and backward, of the expert
blocks of Qwen3-30B-A3B, OLMoE, Mixtral and DeepSeek-V3 (forward), T from 1 to 32768, random and skewed routing.  Sides:
what the planner chose (``torch.compile(..., backend="moepass")``), each lowering, Hugging Face's ``grouped_mm`` (eager,
Inductor), ``batched_mm`` and loop, a separate permute with ``F.grouped_mm``, ScatterMoE where ``--scattermoe DIR`` is
given.
A side that is wrong is named and not timed; cells for which no time is left are listed as not measured.  Before a
shape is timed, its tiles are tuned (``--tune`` seconds in all): the target's tuning table in ``kernels/tuning`` is
brought up to date.  At the end the hardware profile is fitted to half of the cells and judged on the other half.

Results go to ``benchmarks/results/<accelerator>.{json,md,svg}``, with the tuning table and the profile beside them: a
file is named by the hardware that wrote it, and nothing but a run on that hardware writes it.  ``--device cpu`` runs
the same code on small shapes, into ``--out`` only, and tunes nothing.

    python -m benchmarks.gpu_moe [--minutes 8] [--tune 90] [--shapes qwen3-30b-a3b,olmoe] [--scattermoe DIR]
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import shutil
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import moepass
from benchmarks import common
from benchmarks.gpu import cells, chart, check, clock, fit, sides, tune
from benchmarks.gpu.cells import Cell, Shape
from benchmarks.gpu.sides import FORMS, OURS, Bench, Side, is_peer
from moepass.lowering import planner
from moepass.lowering.hardware import Hardware, load_hardware
from moepass.lowering.plan import Plan, TokenRange, Workload
from moepass.lowering.registry import lowerings

#: Up to here a forward pass is also timed as a replayed CUDA graph: decode is launched that way.
GRAPH_TOKENS = 64
#: Sides whose captured graph must do on new tokens what an eager call does, at these T.
REPLAYED, REPLAY_TOKENS = (OURS, "fused"), (1, 64)


def verified(
    shape: Shape, dtype: torch.dtype, device: str, scattermoe: Path | None
) -> tuple[list[dict[str, Any]], set[str]]:
    """Errors of every side on a block of the same widths with few experts; and the names of those that are wrong."""
    few = check.small(shape)
    rows, wrong = [], set()
    for routing in ("random", "skewed"):
        many, decode = Cell(few, 257, few.trains, routing), Cell(few, 4, False, routing)
        bench = sides.make(few, *cells.weights(few, dtype, device), scattermoe)
        truths = {cell: check.exact(cell, dtype, device) for cell in (many, decode)}
        for name, side in bench.sides.items():
            cell = decode if name in FORMS else many
            try:
                errors = check.relative_errors(bench, side, cell, truths[cell])
                errors |= _replays(name, side, few, routing, dtype, device)
            except Exception as e:  # a peer that cannot run here is a finding, not the end
                rows.append({"shape": shape.name, "routing": routing, "side": name, "failed": _first_line(e)})
                wrong.add(name)
                continue
            if max(errors.values()) > check.TOLERANCE[dtype] or (name == OURS and not _is_rewritten()):
                wrong.add(name)
            rows.append({"shape": shape.name, "routing": routing, "side": name, "errors": errors})
    _forget()
    return rows, wrong


def _replays(name: str, side: Side, few: Shape, routing: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Errors of replayed graphs, by T; infinite where the fused kernels, which plans need not use, are not captured."""
    if name not in REPLAYED or device != "cuda":
        return {}
    found = {T: check.replay_error(side, Cell(few, T, False, routing), dtype, device) for T in REPLAY_TOKENS}
    known = {T: math.inf if error is None else error for T, error in found.items() if error is not None or name != OURS}
    return {f"replayed, T={T}": error for T, error in known.items()}


def measured(cell: Cell, bench: Bench, skip: set[str], repeats: int, ceiling: dict[str, float]) -> dict[str, Any]:
    """One row: seconds by side, TFLOP/s and share of the roofline of ours, what the planner chose and its regret."""
    device, dtype = bench.w_in.device.type, bench.w_in.dtype
    operands = x_TD, score_TE = cells.leaves(cell, dtype, device)
    chosen = {n: s for n, s in bench.chosen_for(cell, x_TD).items() if n not in skip}
    calls, failed = _runnable({name: _step(side, operands, bench, cell.train) for name, side in chosen.items()}, device)
    timings = clock.in_turns(calls, repeats, device)
    row: dict[str, Any] = {
        "shape": cell.shape.name,
        "T": cell.tokens,
        "mode": cell.mode,
        "routing": cell.routing,
        "active experts": int(cells.route(score_TE, cell.shape.K)[0].unique().numel()),
        "chosen": _chosen(bench, cell, x_TD),
        "seconds": {name: t.median for name, t in timings.items()},
        "quartiles": {name: [t.low, t.high] for name, t in timings.items()},
        "failed": failed,
    }
    if cell.tokens <= GRAPH_TOKENS and not cell.train:
        replays = {n: r for n, call in calls.items() if (r := clock.captured(call, device)) is not None}
        row["graph seconds"] = {name: t.median for name, t in clock.in_turns(replays, repeats, device).items()}
    if cell.train:
        kept = {n: clock.kept_bytes(lambda s=s: s(*operands), device) for n, s in chosen.items() if n in timings}
        row["kept for backward"] = kept
    return row | _judged(row, cell, ceiling, bench.w_in.element_size())


def _judged(row: dict[str, Any], cell: Cell, ceiling: dict[str, float], itemsize: int) -> dict[str, Any]:
    """What the seconds say: of ours TFLOP/s, share of the roofline (best of eager and graph), ratios, regret."""
    eager, graph = row["seconds"], row.get("graph seconds", {})
    if OURS not in eager:
        return {"TFLOP/s": None, "roofline": None, "ratios": {}, "regret": None}
    ours = eager[OURS]
    floor = max(cell.flops / ceiling["flops"], cell.floor_bytes(row["active experts"], itemsize) / ceiling["bandwidth"])
    known = {name: eager[name] for name in lowerings() if name in eager}
    return {
        "TFLOP/s": cell.flops / ours / 1e12,
        "roofline": floor / min(ours, graph.get(OURS, ours)),
        "ratios": {n: s / ours for n, s in eager.items() if is_peer(n)},
        "graph ratios": {n: s / graph[OURS] for n, s in graph.items() if is_peer(n) and OURS in graph},
        "regret": known[row["chosen"]] / min(known.values()) if row["chosen"] in known else None,
    }


def _runnable(calls: dict[str, Any], device: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The calls that run once, and why the others do not."""
    failed = {}
    for name in list(calls):
        try:
            clock.burst_seconds(calls[name], 1, device)
        except Exception as e:  # out of memory, a kernel that does not compile here
            failed[name] = _first_line(e)
            del calls[name]
            _forget()
    return calls, failed


def _step(side: Side, operands: tuple[torch.Tensor, ...], bench: Bench, train: bool) -> Any:
    wanted = [t for t in (*operands, bench.w_in, bench.w_out) if train]

    def forward() -> object:
        with torch.no_grad():
            return side(*operands)

    def both() -> object:
        y_TD = side(*operands)
        return torch.autograd.grad(y_TD, wanted, torch.ones_like(y_TD))

    return both if train else forward


@functools.cache
def _plans(work: Workload, hw: Hardware) -> list[Plan]:
    return planner.ranges(work, hw, TokenRange(low=2))


def _chosen(bench: Bench, cell: Cell, x_TD: torch.Tensor) -> str:
    """What the backend's plan for a dynamic T (or for T = 1, which compilers keep apart) uses in this cell."""
    work, hw = bench.work(cell, x_TD), load_hardware(None, x_TD.device.type)
    if cell.tokens == 1:
        return planner.choose(work, hw)
    plans = _plans(work.model_copy(update={"tokens": 0}), hw)
    return next(p.lowering for p in plans if cell.tokens in p.tokens)


def _is_rewritten() -> bool:
    """Whether the backend lowered the block that it compiled last."""
    report = moepass.last_plan()
    return report is not None and any(site.status == "lowered" for site in report.sites)


def _forget() -> None:
    cells.tokens_and_scores.cache_clear()
    torch.compiler.reset()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def name_of(device: str) -> str:
    """What the results are called: ``h200`` for an NVIDIA H200, ``cpu`` without an accelerator."""
    if device == "cpu":
        return "cpu"
    full = torch.cuda.get_device_name().lower()
    found = re.search(r"\b([abh]\d{2,3}|gb\d{3}|mi\d{3}x?)\b", full)
    return found[1] if found else re.sub(r"[^a-z0-9]+", "_", full)


def run(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Check, then measure until the time is up."""
    start, dtype = time.monotonic(), getattr(torch, args.dtype)
    # All sides share the code of one module: past the limit Dynamo would run them uncompiled, under a compiled name.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    wanted = args.shapes.split(",")
    shapes = cells.SMALL if device == "cpu" else tuple(s for s in cells.SHAPES if s.name in wanted)
    tokens = tuple(map(int, args.tokens.split(","))) if args.tokens else cells.TOKENS
    left = list(cells.grid(shapes, tokens, tuple(args.routing.split(","))))
    found: dict[str, Any] = {"errors": [], "rows": [], "tuned": [], "table": None}
    found["ceilings"] = clock.ceilings(device, dtype)
    for shape in shapes:
        rows, wrong = verified(shape, dtype, device, args.scattermoe)
        found["errors"] += rows
        if OURS in wrong:
            print(f"WRONG on {shape.name}: {[r for r in rows if r['side'] == OURS]}", flush=True)
            continue
        bench = sides.make(shape, *cells.weights(shape, dtype, device), args.scattermoe)
        if device != "cpu" and "fused" not in wrong:
            _tune(found, bench, [c for c in left if c.shape == shape], args.tune / len(shapes))
        for cell in [c for c in left if c.shape == shape]:
            if time.monotonic() - start > 60 * args.minutes:
                break
            found["rows"].append(measured(cell, bench, wrong, args.repeats, found["ceilings"]))
            left.remove(cell)
            print(_line(found["rows"][-1]), flush=True)
        del bench
        _forget()
    found["not measured"] = [f"{c.shape.name} T={c.tokens} {c.mode} {c.routing}" for c in left]
    return found | {"minutes": (time.monotonic() - start) / 60}


def _tune(found: dict[str, Any], bench: Bench, todo: list[Cell], seconds: float) -> None:
    """Better tiles for a shape, installed at once; what they gained joins the results."""
    entries, gains = tune.tune_all(bench, todo, seconds)
    found["tuned"] += gains
    versions = {"torch": torch.__version__, "triton": metadata.version("triton"), "moepass": moepass.__version__}
    found["table"] = tune.install(entries, bench, versions) or found["table"]


def _profile(found: dict[str, Any], dtype: str, device: str) -> tuple[Hardware, dict[str, Any]] | None:
    """The profile that fits, and how far it is off where it has not looked; None without measured lowerings."""
    shapes = {s.name: s for s in (*cells.SHAPES, *cells.SMALL)}
    measured = [
        (fit.workload_of(row, dtype, device, shapes[row["shape"]]), {n: row["seconds"][n] for n in known})
        for row in found["rows"]
        if (known := [n for n in lowerings() if n in row["seconds"]])
    ]
    seen, unseen = fit.halves(measured)
    if device == "cpu" or not unseen:
        return None
    before = load_hardware(None, device)
    after = fit.profile(before, found["ceilings"], dtype, seen)
    return after, {"before": fit.error(before, unseen), "after": fit.error(after, unseen)}


def _line(row: dict[str, Any]) -> str:
    ours = row["seconds"].get(OURS)
    text = f"{row['shape']:14} T={row['T']:<6} {row['mode']:17} {row['routing']:7} {row['chosen']:8}"
    return text + (" failed" if ours is None else f" {ours * 1e6:9.0f} us {row['TFLOP/s']:6.1f} TFLOP/s")


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of the table."""
    ratios: dict[str, float] = row["ratios"]
    best = min(ratios, key=ratios.__getitem__) if ratios else "none"
    eager = {key: row[key] for key in ("shape", "T", "mode", "routing", "chosen")}
    return eager | {
        "moepass [us]": row["seconds"].get(OURS, float("nan")) * 1e6,
        "TFLOP/s": row["TFLOP/s"] or float("nan"),
        "of the roofline": row["roofline"] or float("nan"),
        "HF Inductor / moepass": ratios.get("HF grouped_mm, Inductor", float("nan")),
        "HF eager / moepass": ratios.get("HF grouped_mm, eager", float("nan")),
        "best peer": best,
        "best peer / moepass": ratios.get(best, float("nan")),
        "regret": row["regret"] or float("nan"),
    }


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results under the name of this machine's accelerator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="cpu: small shapes, to try the command; needs --out")
    parser.add_argument("--shapes", default=",".join(s.name for s in cells.SHAPES))
    parser.add_argument("--tokens", default=None, help="comma-separated T")
    parser.add_argument("--routing", default="random,skewed")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tune", type=float, default=90.0, help="seconds for tuning tiles, in all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scattermoe", type=Path, default=None, help="folder that holds the package scattermoe")
    parser.add_argument("--out", type=Path, default=None, help="folder for the results")
    args = parser.parse_args(argv)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = args.device or (accelerator.type if accelerator is not None else None)
    if device is None:
        parser.error("no accelerator here; --device cpu --out DIR tries the command on small shapes")
    if device == "cpu" and args.out is None:
        parser.error("--device cpu writes no results of its own: give --out DIR")
    about = common.machine() | ({} if device == "cpu" else {"accelerator": torch.cuda.get_device_name()})
    found = run(args, device)
    return _write(found, device, about, args)


def _write(found: dict[str, Any], device: str, about: dict[str, Any], args: argparse.Namespace) -> Path:
    name, ceiling = name_of(device), found["ceilings"]
    notes = [
        f"{args.dtype}; medians of {args.repeats} bursts, sides in turns; {found['minutes']:.1f} minutes in all",
        f"this machine in the same run: GEMM {ceiling['flops'] / 1e12:.1f} TFLOP/s, copy "
        f"{ceiling['bandwidth'] / 1e12:.2f} TB/s, {ceiling['launch'] * 1e6:.1f} us a kernel",
        f"not measured, for want of time: {', '.join(found['not measured']) or 'nothing'}",
    ]
    fitted = _profile(found, args.dtype, device)
    if fitted is not None:
        off = ", ".join(f"{n} {e:.2f}" for n, e in fitted[1]["after"].items())
        notes.append(f"the fitted profile is off by these factors on cells it has not seen (geometric means): {off}")
    regrets = [row["regret"] for row in found["rows"] if row["regret"]]
    if regrets:
        mean = common.geometric_mean(regrets)
        notes.append(f"regret of the planner: geometric mean {mean:.3f}, worst {max(regrets):.2f}")
    extra = {key: found[key] for key in ("ceilings", "errors", "rows", "tuned", "not measured")}
    extra["profile error"] = None if fitted is None else fitted[1]
    path = common.write(
        name, [summary(r) for r in found["rows"]], title=f"MoE blocks on {name}", notes=notes, about=about,
        out=args.out, extra=extra,
    )  # fmt: skip
    chart.draw(found["rows"], path.with_suffix(".svg"), title=f"{name}: moepass and its peers")
    if fitted is not None:
        path.with_suffix(".profile.json").write_text(fitted[0].model_dump_json(indent=1) + "\n", encoding="utf-8")
    if found["table"] is not None:
        shutil.copy(found["table"], path.with_name(f"{name}.{found['table'].name}"))
    return path


if __name__ == "__main__":
    main()
