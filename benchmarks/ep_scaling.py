"""Scaling of expert parallelism: predicted over 1 to 512 ranks, and predicted beside measured over gloo processes here.

The prediction is weak scaling: every rank has the same number of tokens, nodes have eight ranks, and the best form is
taken.  Relative throughput is the time of one rank that holds all experts over the time of P ranks.  A model ends where
its experts do not divide any more.  The comparison measures rates and links among the very processes that it times, as
``moepass calibrate`` and ``moepass calibrate --dist`` do.  Training steps of a small model are then timed, compiled
beside eager.

    python -m benchmarks.ep_scaling [--hardware H200] [--tokens 4096] [--models olmoe-1b-7b,...] [--measure 1,2,4]
                                    [--steps 2] [--repeats 15]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.ep import measured, steps
from moepass.explain import targets
from moepass.lowering.ep_plan import form_plan, on_mesh
from moepass.lowering.hardware import Hardware, load_hardware
from moepass.lowering.mesh import parse
from moepass.lowering.plan import Workload
from moepass.preview.what_if import sweeps

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
#: Ranks of a node.
LOCAL = 8


def mesh_text(P: int) -> str:
    """``ep=4`` within a node, ``node=4,ep=8`` beyond."""
    return f"ep={P}" if P <= LOCAL else f"node={P // LOCAL},ep={LOCAL}"


def blocks(model: str) -> Workload:
    """The MoE block of a published model that costs most to read: the model is traced, no weights are needed."""
    found = sweeps(model, ["H200"], ["random"], (512,))
    return max((sweep.workload for sweep in found), key=lambda work: work.E * work.weight_elements)


def predicted(model: str, block: Workload, hw: Hardware, tokens: int, train: bool) -> list[dict[str, Any]]:
    """One row for each number of ranks that divides the experts."""
    work = block.model_copy(update={"tokens": tokens, "train": train})
    rows: list[dict[str, Any]] = []
    for P in RANKS:
        plan = form_plan(on_mesh(work, parse(mesh_text(P), hw)), hw)
        if plan.chosen is None or plan.chosen.predicted is None:
            continue
        price = plan.chosen.predicted
        alone = rows[0]["block [ms]"] if rows else price.total * 1e3
        rows.append(
            {
                "model": model,
                "P": P,
                "form": plan.form,
                "block [ms]": price.total * 1e3,
                "links [ms]": price.communication * 1e3,
                "relative throughput": alone / (price.total * 1e3),
                "with chunks": alone / (price.overlap.total * 1e3),
                "experts of a rank [GB]": price.weight_bytes / 1e9,
            }
        )
    return rows


def chart(rows: Sequence[dict[str, Any]], path: Path, title: str) -> bool:
    """Relative throughput over ranks, a line for each model; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"no chart: {path.name} needs matplotlib")
        return False
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ep_scaling", "font.size": 9}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    for style, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        of = [row for row in rows if row["model"] == model]
        line = ("-", "--", "-.", ":")[style % 4]
        axes.plot([r["P"] for r in of], [r["relative throughput"] for r in of], line, marker=".", label=model)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("EP ranks P (nodes of 8)")
    axes.set_ylabel("predicted time of one rank / of P ranks")
    axes.set_title(title, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def error(rows: Sequence[dict[str, Any]]) -> str:
    """How far predictions are from measurements, in a sentence."""
    ratios = [row["measured over predicted"] for row in rows]
    off = [abs(math.log(ratio)) for ratio in ratios]
    return (
        f"error of the prediction: median factor {math.exp(statistics.median(off)):.2f}, worst "
        f"{math.exp(max(off)):.2f}; "
        f"measured over predicted from {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} points"
    )


def _measure(args: argparse.Namespace, about: dict[str, str | int]) -> Path | None:
    """Single passes of every form, beside what the cost model says; None where none are asked for."""
    timed = [row for P in filter(None, args.measure.split(",")) for row in measured.run(int(P), args.repeats)]
    if not timed:
        return None
    told = [error(timed), f"medians of {args.repeats} passes of the slowest rank; eager, one thread a rank, float32"]
    head = "Expert parallelism over gloo processes: measured beside predicted"
    return common.write("ep_measured", timed, title=head, notes=told, about=about, out=args.out)


def _steps(args: argparse.Namespace, about: dict[str, str | int]) -> Path | None:
    """Training steps compiled beside eager; None where none are asked for."""
    counts = [int(P) for P in filter(None, args.steps.split(","))]
    timed = [row for P in counts for row in steps.run(P, args.repeats, args.step_tokens)]
    if not timed:
        return None
    told = [
        steps.summary(timed),
        f"medians of {args.repeats} turns of the slowest rank; one thread a rank, float32",
        "a pass is forward and backward; compiled: backend='moepass', fullgraph=True, through Inductor; the optimizer, "
        "averaging and clipping are eager on both sides",
    ]
    head = "Expert parallelism over gloo processes: training steps compiled beside eager"
    return common.write("ep_steps", timed, title=head, notes=told, about=about, out=args.out)


def main(argv: Sequence[str] | None = None) -> Path:
    """Predict, measure, and write the results; returns the last file written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hardware", default="H200", help="profile of every rank of the prediction")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a rank in the prediction")
    parser.add_argument("--models", default=",".join(targets.PUBLISHED), help="published models, comma-separated")
    parser.add_argument("--forward", action="store_true", help="predict the forward pass alone")
    parser.add_argument("--measure", default="1,2,4", help="numbers of gloo processes to time; '' for none")
    parser.add_argument("--steps", default="2", help="numbers of gloo processes that train, compiled beside eager")
    parser.add_argument("--step-tokens", type=int, default=256, help="tokens of a rank in these steps")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args(argv)

    about, hw = common.machine(), load_hardware(args.hardware)
    mode = "forward" if args.forward else "forward and backward"
    title = f"{mode} of an MoE block, {args.tokens} tokens a rank, on {hw.name}, estimated"
    path = folder = common.RESULTS if args.out is None else args.out
    rows: list[dict[str, Any]] = []
    for model in filter(None, args.models.split(",")):
        rows += predicted(model, blocks(model), hw, args.tokens, not args.forward)
    notes = [
        "every figure is an estimate of the cost model; links are presets, assumed (lowering/links.py)",
        "ranks are weakly scaled: each has its own tokens; random routing; the best form in one piece is taken",
        "P = 1 holds all experts, whether they would fit or not",
    ]
    if rows:
        if chart(rows, folder / "ep_scaling.svg", title):
            notes.append("chart: ep_scaling.svg")
        head = f"Expert parallelism: {title}"
        path = common.write("ep_scaling", rows, title=head, notes=notes, about=about, out=args.out)
    for written in (_measure(args, about), _steps(args, about)):
        path = written or path
    return path


if __name__ == "__main__":
    main()
