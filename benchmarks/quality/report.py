"""From runs to the table, the JSON with every curve, and the chart."""

from __future__ import annotations

import dataclasses
import datetime
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.quality.arms import ARMS, BALANCE, MAIN
from benchmarks.quality.training import BUMP_STEPS, Corpus, Setup

NAME = "upcycle_quality"
Run = Mapping[str, Any]


def bump(run: Run) -> float:
    """How far the held-out loss rises above that of step 0 in the first steps; 0 if it never does."""
    early = [loss for step, loss in run["held_out"].items() if int(step) <= BUMP_STEPS]
    return max(early) - early[0]


def excess(run: Run, dense: Run) -> float:
    """How far the held-out loss rises above continued dense training's at the same step, at any step."""
    return max(loss - dense["held_out"][step] for step, loss in run["held_out"].items() if step in dense["held_out"])


def line(run: Run) -> str:
    """One run in a few numbers."""
    whole = run["whole"]
    share = f", whole groups {whole.get('50', 1.0):.0%} at 50, {list(whole.values())[-1]:.0%} last" if whole else ""
    seconds = run["seconds_per_step"]
    return f"start {run['held_out']['0']:.4f}, bump {bump(run):.4f}, final {run['final']:.4f}{share}, {seconds:.3f} s"


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per arm, in the order of the arms; differences are taken seed by seed."""
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run["arm"], []).append(run)
    dense = {run["seed"]: run for run in by_arm.get("dense", [])}
    return [_row(name, by_arm[name], dense) for name in ARMS if name in by_arm]


def _row(name: str, runs: Sequence[Run], dense: Mapping[int, Run]) -> dict[str, Any]:
    pairs = [(run, dense[run["seed"]]) for run in runs if run["seed"] in dense]
    if name == "dense":
        pairs = []
    paired, above = (
        [run["final"] - other["final"] for run, other in pairs],
        [excess(*pair) for pair in pairs if not ARMS[name].longer],
    )
    first = runs[0]
    reference = next(iter(dense.values()), None)

    def ratio(field: str) -> str:
        return "" if reference is None else f"{first[field] / reference[field]:.2f}x"

    return {
        "arm": ("" if name in MAIN else "groups, ") + ARMS[name].text,
        "step 0": f"{first['held_out']['0']:.4f}" if ARMS[name].exact else _spread([r["held_out"]["0"] for r in runs]),
        "bump": _spread([bump(run) for run in runs], digits=3),
        "above dense": _spread(above, digits=3) if above else "",
        "final loss": _spread([run["final"] for run in runs]),
        "minus dense": _spread(paired, signed=True) if paired else "",
        "tokens": ratio("steps"),
        "FFN FLOPs / token": ratio("ffn_flops"),
        "FLOPs / token": ratio("flops"),
        "parameters": first["parameters"],
        "seeds": len(runs),
    }


def _spread(values: Sequence[float], *, digits: int = 4, signed: bool = False) -> str:
    sign = "+" if signed else ""
    text = f"{statistics.fmean(values):{sign}.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def write(
    runs: Sequence[Run],
    setup: Setup,
    corpus: Corpus,
    *,
    command: str,
    about: Mapping[str, str | int],
    out: Path | None,
) -> Path:
    """``upcycle_quality.{md,json,svg}``."""
    dense_flops = next((f"{run['ffn_flops']:,}" for run in runs if run["arm"] == "dense"), "(not run)")
    notes = [
        f"Llama, D={setup.width}, F={setup.hidden}, {setup.layers} layers; bytes of the standard library (text "
        f"{corpus.digest}, {len(corpus.train) / 1e6:.1f} MB), {setup.length} bytes x {setup.batch} a step",
        f"AdamW {setup.lr:g}, {setup.warmup} steps of warm-up; {setup.pretrain} dense steps at a constant rate, then "
        f"{setup.steps} per arm, the last 40 % decaying to zero; load balancing {BALANCE:g} per layer",
        f"loss in nats per byte on {setup.final_windows} held-out windows; on {setup.curve_windows} of them: step 0, "
        f"bump (highest loss of the first {BUMP_STEPS} steps minus step 0's), above dense (highest difference to "
        "continued dense training at the same step, at any step)",
        "± is the standard deviation over seeds (order of the batches, router, redrawn channels); the dense checkpoint "
        "is the same; 'minus dense' is taken seed by seed",
        f"FFN FLOPs of the dense model: {dense_flops} per token, forward and backward; ratios include routers",
        f"command: {command}; date {datetime.date.today().isoformat()}",
    ]
    title = "What upcycling does to quality"
    extra = {"setup": dataclasses.asdict(setup), "runs": [_rounded(r) for r in runs]}
    path = common.write(NAME, rows(runs), title=title, notes=notes, about=about, out=out, extra=extra)
    chart(runs, path.with_suffix(".svg"))
    return path


def _rounded(run: Run) -> dict[str, Any]:
    curves = {key: {step: round(value, 5) for step, value in run[key].items()} for key in ("held_out", "whole")}
    return dict(run) | curves


def chart(runs: Sequence[Run], path: Path) -> None:
    """Held-out loss minus continued dense training's; lines are means, bands reach from lowest to highest seed.

    Arms that ran with fewer seeds than others are left to the table.
    """
    dense = {run["seed"]: run["held_out"] for run in runs if run["arm"] == "dense"}
    if not dense:
        print(f"no chart: {path.name} shows distances to the dense arm")
        return
    pyplot = common.pyplot(path, NAME)
    if pyplot is None:
        return
    figure, (early, late) = pyplot.subplots(1, 2, figsize=(10, 4.2))
    seeds = {name: sum(run["arm"] == name for run in runs) for name in ARMS}
    shown = [name for name in ARMS if seeds[name] == max(seeds.values()) and not ARMS[name].longer and name != "dense"]
    for number, name in enumerate(shown):
        mine = {run["seed"]: run["held_out"] for run in runs if run["arm"] == name and run["seed"] in dense}
        above = [{step: loss - dense[seed][step] for step, loss in curve.items()} for seed, curve in mine.items()]
        for axis in (early, late) if above else ():
            _band(axis, above, label=ARMS[name].text, color=f"C{number % 10}", ls=("-", "--")[number // 10 % 2])
    for axis in (early, late):
        axis.axhline(0.0, color="black", lw=0.6)
        axis.set(xlabel="step")
    early.set(xlim=(0, BUMP_STEPS), ylim=(-0.03, 0.3), ylabel="nats per byte", title="above continued dense: the start")
    late.set(ylim=(-0.07, 0.1), title="the whole run")
    early.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _band(axis: Any, curves: Sequence[Mapping[str, float]], *, label: str, **style: Any) -> None:
    steps = [int(step) for step in curves[0]]
    columns = list(zip(*(curve.values() for curve in curves), strict=True))
    axis.plot(steps, [statistics.fmean(c) for c in columns], lw=1.2, label=label, **style)
    axis.fill_between(
        steps, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15, lw=0, color=style["color"]
    )
