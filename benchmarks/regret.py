"""Regret of the planner on this machine: measured time of what it chose over the best measured lowering.

For every width and dtype, over a grid of T, all legal lowerings are timed (``moepass.lowering.measure``) and compared
with the planner's choice, per point (``planner.plan``) and within its at most three ranges (``planner.ranges``).
1.00 is perfect.

    python -m benchmarks.regret [--tokens 1,8,64,512] [--hardware NAME] [--train]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from moepass.lowering import measure, planner, registry
from moepass.lowering.hardware import Hardware, load_hardware
from moepass.lowering.plan import TokenRange, Workload

#: D, F (of one expert), E, K, n: the default rewrite of a D=1024 model, a small and a fine-grained MoE, an ungated one.
SHAPES = {
    "default rewrite": (1024, 2048, 8, 2, 2),
    "small": (256, 512, 8, 2, 2),
    "fine-grained": (512, 256, 64, 8, 2),
    "ungated": (768, 1536, 8, 2, 1),
}


def point(shape: str, tokens: int, dtype: str, train: bool, hw: Hardware, repeats: int) -> dict[str, Any]:
    """Time every legal lowering of one workload; one row."""
    D, F, E, K, n = SHAPES[shape]
    work = Workload(tokens=tokens, D=D, F=F, E=E, K=K, n=n, dtype=dtype, train=train)
    domain = TokenRange(low=1, high=4096)
    timings = measure.measure(work, registry.lowerings(), repeats=repeats, use_cache=False)
    chosen = planner.plan(work, TokenRange(low=tokens, high=tokens), hw).lowering
    ranged = next(p.lowering for p in planner.ranges(work, hw, domain) if tokens in p.tokens)
    best = min(timings, key=timings.__getitem__)
    return {
        "shape": shape,
        "T": tokens,
        "dtype": dtype,
        "chosen": chosen,
        "in ranges": ranged,
        "best": best,
        "best [ms]": timings[best] * 1e3,
        "regret": timings[chosen] / timings[best],
        "regret in ranges": timings[ranged] / timings[best],
    }


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure the grid and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1,4,16,64,256,1024", help="comma-separated T")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--hardware", help="profile to plan with; by default this machine's")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for the results")
    args = parser.parse_args(argv)

    about, hw = common.machine(), load_hardware(args.hardware)
    rows = []
    for shape in args.shapes.split(","):
        for dtype in args.dtypes.split(","):
            for tokens in map(int, args.tokens.split(",")):
                rows.append(point(shape, tokens, dtype, args.train, hw, args.repeats))
                print(common.table(rows[-1:]), flush=True)
    notes = [f"planned with the profile {hw.name} ({hw.source}); medians of {args.repeats} interleaved runs, eager"]
    for column in ("regret", "regret in ranges"):
        values = [row[column] for row in rows]
        notes.append(f"{column}: geometric mean {common.geometric_mean(values):.3f}, worst {max(values):.2f}")
    name = "regret_train" if args.train else "regret"
    title = "Planner regret on this CPU, " + ("forward and backward" if args.train else "forward")
    return common.write(name, rows, title=title, notes=notes, about=about, out=args.out)


if __name__ == "__main__":
    main()
