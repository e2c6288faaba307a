"""``python -m moepass.kernels.aot``: compile every selected configuration for every target, no GPU needed.

Without ``--write`` the results are held to ``budgets.json`` (exit code 1 where one breaks its budget); with it they
become the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor

from moepass.kernels.aot import budgets, compile, problems
from moepass.kernels.fused.problem import TARGETS


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 where every budget is kept."""
    parser = argparse.ArgumentParser(prog="python -m moepass.kernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write budgets.json instead of checking it")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this target; repeatable")
    parser.add_argument("--shape", action="append", choices=sorted(problems.SHAPES), help="only this; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    given = parser.parse_args(arguments)
    if not compile.available():
        print("kernels cannot be compiled here: Triton is missing, or TRITON_INTERPRET is set", file=sys.stderr)
        return 2
    shapes = tuple(given.shape or problems.SHAPES)
    work = [(name, case) for name in given.target or TARGETS for case in problems.cases(TARGETS[name], shapes)]
    with ProcessPoolExecutor(given.jobs) as pool:
        found = list(pool.map(_compile, work))
    said = []
    table: dict[str, dict[str, budgets.Entry]] = {}
    for (name, case), resources in zip(work, found, strict=True):
        entry = budgets.entry(case.launch, resources)
        table.setdefault(name, {})[case.key] = entry
        said += budgets.unfit(case.key, case.launch, TARGETS[name], resources)
        if not given.write:
            known = budgets.load().targets.get(name, {}).get(case.key)
            said += budgets.broken(case.key, case.launch, TARGETS[name], resources, known)
    print("\n".join([*said, f"{len(work)} configurations compiled, {len(said)} complaints"]))
    if given.write:
        _write(table, complete=not given.target and not given.shape)
    return 1 if said else 0


def _compile(work: tuple[str, problems.Case]) -> compile.Resources:
    name, case = work
    print(f"{name} {case.key}", file=sys.stderr, flush=True)
    return compile.compile_launch(case.launch, TARGETS[name])


def _write(table: dict[str, dict[str, budgets.Entry]], *, complete: bool) -> None:
    """Replace the table, or only what was compiled."""
    import triton

    if not complete:
        old = budgets.load().targets
        table = {name: {**old.get(name, {}), **table.get(name, {})} for name in {**old, **table}}
    new = budgets.Budgets(triton=triton.__version__, targets=table)
    lines = []
    for name, entries in sorted(new.targets.items()):
        rows = [f"    {json.dumps(key)}: {_text(entry)}" for key, entry in entries.items()]
        lines.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n  }")
    text = f'{{"triton": {json.dumps(new.triton)}, "targets": {{\n' + ",\n".join(lines) + "\n}}\n"
    scratch = budgets.PATH.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.replace(budgets.PATH)


def _text(entry: budgets.Entry) -> str:
    """A row's entry; nothing is said of descriptors where there are none."""
    return entry.model_dump_json(exclude=None if entry.resources.tma else {"resources": {"tma"}})


if __name__ == "__main__":
    sys.exit(main())
