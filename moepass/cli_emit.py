"""``moepass emit``: the Triton kernels of a plan as files that need torch and triton only.

``moepass.cli`` registers this function and turns errors of moepass into one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepass import cli_plan, errors

if TYPE_CHECKING:
    from moepass.explain.kernels import Block
    from moepass.explain.report import PlanReport


def emit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|PLAN", help="As for `moepass explain`, or a plan that it wrote as JSON.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="A folder that is made here.")],
    target: Annotated[
        str, typer.Option(help="sm_80, sm_90, sm_100 or gfx942, or hardware: A100, H100, H200, B200, MI300X.")
    ],
    tokens: Annotated[str | None, typer.Option(help="Token counts T to plan for, for instance 1,512,8192.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: MODEL's own.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward.")] = False,
    lowering: Annotated[
        str | None, typer.Option(help="fused: write kernels for every block that they could run, chosen or not.")
    ] = None,
    transposed: Annotated[bool, typer.Option("--transposed", help="Weights lie as [E, D, n*F] and [E, F, D].")] = False,
    interleaved: Annotated[bool, typer.Option("--interleaved", help="Gate and up rows alternate (GPT-OSS).")] = False,
) -> None:
    """Write the Triton kernels of MODEL's plan: per block one readable file a kernel, and moe.py, which calls them.

    `python FILE` compares a file with plain PyTorch, on a GPU, or in Triton's interpreter where there is none.
    """
    if lowering not in (None, "fused"):
        raise errors.BadOption(name="--lowering", value=lowering, detail="only fused has kernels to write")
    with contextlib.redirect_stdout(sys.stderr):  # whatever the user's code prints is not the result
        from moepass.explain import kernels

        profile = kernels.profile_of(target)
        report = _report(model, profile, tokens, dtype, train)
        layout = kernels.Layout(transposed=transposed, interleaved=interleaved)
        every = lowering == "fused"
        blocks = kernels.blocks(report, kernels.ARCHITECTURES[profile], every=every, layout=layout)
    if not blocks:
        detail = "no block can run them" if every else "no block's plan is fused; --lowering fused writes them anyway"
        raise errors.BadOption(name="MODEL", value=model, detail=detail)
    _write(output, blocks, report)
    for block in blocks:
        count = len(block.emitted.files)
        typer.echo(f"{output / block.folder}: {count} files for {block.label}, {block.site.tokens or 'any T'}")


def _report(model: str, profile: str, tokens: str | None, dtype: str | None, train: bool) -> PlanReport:
    path = Path(model)
    if path.suffix == ".json" and path.name != "config.json":
        if tokens is not None or dtype is not None or train:
            raise errors.BadOption(name="MODEL", value=model, detail="a plan has its own tokens, dtype and mode")
        return cli_plan.read(path)
    from moepass.preview.run import explain_target

    return explain_target(model, tokens=cli_plan.token_counts(tokens), dtype=dtype, train=train, hardware=profile)


def _write(output: Path, blocks: tuple[Block, ...], report: PlanReport) -> None:
    from moepass.explain.files import write_folder

    files = {f"{block.folder}/{name}": text for block in blocks for name, text in block.emitted.files.items()}
    try:
        write_folder(output, {**files, "plan.json": report.to_json()})
    except OSError as error:
        detail = str(error) if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise errors.BadOption(name="--output", value=str(output), detail=detail) from error
