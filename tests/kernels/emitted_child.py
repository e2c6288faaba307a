"""Runs in its own process with TRITON_INTERPRET=1: emits blocks, runs every file's check, compares with the library.

argv: a folder for the files.  stdout: one JSON list of ``[case, what, passed]``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import torch

from moepass.kernels.emit.block import emit_block
from moepass.kernels.fused import runner, schedule, schedule_backward, schedule_decode, select
from moepass.kernels.fused.problem import TARGETS, Needs, Problem, Tiles

T = 5
TARGET = replace(TARGETS["sm_90"], sms=2)


def problem(**fields):
    D, F, E, n = 24, 40, 4, fields.get("n", 2)
    shape = {"tokens": 8, "D": D, "F": F, "E": E, "K": 2, "n": n, "dtype": "float32", "activation": "silu(g)*u"}
    return Problem(**{**shape, "w_in": (n * F * D, D, 1), "w_out": (D * F, F, 1), **fields})


CASES = {
    "gated": problem(save=True),
    "ungated": problem(n=1, activation="relu(g)**2", bias_in=True, bias_out=True, index_dtype="int32"),
    "gpt_oss": problem(
        activation="gpt_oss",
        w_in=(24 * 80, 1, 80),
        w_out=(24 * 40, 1, 24),
        bias_in=True,
        bias_out=True,
        interleaved=True,
        save=True,
        tokens=600,  # routing in three kernels
    ),
    "forms": problem(save=True),
}
#: A few programs for all tiles, descriptors for what they can fetch, and rows weighted by the down projection.
FORM = {"persistent": 1, "tma": 2}

#: Weights streamed for a few tokens, the contractions in parts (``small_blocks``).
DECODING = {
    "decoding": problem(tokens=2, bias_in=True, bias_out=True),
    "decoding_gpt_oss": replace(CASES["gpt_oss"], tokens=1, save=False),
}


def small_blocks() -> None:
    """So that contractions of 24 and 40 are cut into parts."""
    schedule_decode.PROGRAMS = 1000
    schedule_decode.ALONG, schedule_decode.ACROSS = 8, 8
    schedule_decode.ELEMENTS = dict.fromkeys(schedule_decode.ELEMENTS, 64)


def module(path: Path):
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def tiles_of(case: str) -> Tiles | None:
    """Those of ``FORM``; None: the schedule's."""
    if case != "forms":
        return None
    tiles = schedule.tiles(CASES[case], TARGET)
    tiles = Tiles(*(t if name == "dw" else t._replace(**FORM) for name, t in tiles._asdict().items()))
    return tiles._replace(down=tiles.down._replace(weigh=True))


def library(case: str, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of the library's kernels, and gradients where they train."""
    p, tiles, device = (CASES | DECODING)[case], tiles_of(case), torch.device("cpu")
    programs = [select.forward(p, TARGET, tiles)]
    if case in CASES:
        tiles = tiles or schedule.tiles(p, TARGET)
        programs.append(schedule_backward.backward(p, tiles, TARGET, Needs(b_in=p.bias_in, b_out=p.bias_out)))
    bound, results = {**given, "b_in": given.get("b_in"), "b_out": given.get("b_out")}, []
    for program in programs:
        made = runner.run(runner.prepare(program), T, bound, device)
        bound |= made
        results += made.values()
    return results


def emitted(p: Problem, moe, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The same by the emitted files."""
    names = ("x_TD", "index_R", "weight_R", "w_in", "w_out", *(b for b in ("b_in", "b_out") if b in given))
    operands = [given[name].view(T, p.K) if name.endswith("_R") else given[name] for name in names]
    forward = moe.forward(*operands)
    if schedule_decode.streams(p):
        return list(forward)
    return [*forward, *moe.backward(given["dy_TD"], *operands, *forward[1:])]


def equal(case: str, moe) -> bool:
    p = (CASES | DECODING)[case]
    given = moe.example(T, "cpu", torch.float32)
    given["w_in"].nan_to_num_(), given["w_out"].nan_to_num_()
    ours, theirs = emitted(p, moe, given), library(case, given)
    rows = int((given["index_R"] < p.E).sum())  # z_RN has no values behind these
    return len(ours) == len(theirs) and all(
        torch.equal(a[:rows], b[:rows]) if a.shape[:1] == (T * p.K,) and a.dim() == 2 else torch.equal(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )


def nothing(moe) -> bool:
    """No tokens: no outputs, and gradients of the weights that are zero."""
    given = moe.example(1, "cpu", torch.float32)
    index_TK, _ = given.pop("index_R").view(1, -1)[:0], given.pop("dy_TD")
    given["weight_TK"] = given.pop("weight_R").view(1, -1)[:0]
    given["x_TD"] = given["x_TD"][:0]
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    y_TD = moe.moe(index_TK=index_TK, **leaves)
    grads = torch.autograd.grad(y_TD.sum(), list(leaves.values()))
    return y_TD.numel() == 0 and not any(g.any() for g in grads)


def exit_code(path: Path) -> int:
    """Of the file run as a program."""
    sys.argv = [str(path)]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def tampered(path: Path) -> int:
    """Exit code of the up projection with the wrong activation."""
    broken = path.with_name("broken.py")
    broken.write_text(path.read_text().replace("    return g * tl.sigmoid(g) * u", "    return g * tl.sigmoid(u) * u"))
    assert broken.read_text() != path.read_text()
    return exit_code(broken)


def main() -> None:
    said = []
    small_blocks()
    for case, p in (CASES | DECODING).items():
        folder = Path(sys.argv[1]) / case
        folder.mkdir()
        for name, text in emit_block(p, TARGET, train=case in CASES, tiles=tiles_of(case)).files.items():
            (folder / name).write_text(text)
        for path in sorted(folder.glob("*.py")):
            file = module(path)
            if path.stem == "moe":
                said += [(case, "moe", file.check_block(file.moe, T, "cpu", torch.float32))]
                said += [(case, "no tokens", case in DECODING or nothing(file))]
                said += [(case, "bit-equal with the library", equal(case, file))]
            else:
                tiles = file.tile_bound(T) if hasattr(file, "tile_bound") else 0
                said += [(case, path.stem, file.check(file.launch, T, tiles, "cpu", torch.float32))]
    up = Path(sys.argv[1]) / "gated/forward_up.py"
    said += [("gated", "exit code 0", exit_code(up) == 0), ("gated", "exit code 1 where it differs", tampered(up) == 1)]
    json.dump(said, sys.stderr)


if __name__ == "__main__":
    main()
