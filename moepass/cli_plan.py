"""``moepass diff``: plans as files, compared; ``moepass sweep``: what each lowering would cost, over T, anywhere.

``moepass.cli`` registers these functions and turns errors of moepass into one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepass import cli_mesh, errors
from moepass.cli_upcycle import Output

if TYPE_CHECKING:
    from moepass.explain.report import PlanReport
    from moepass.lowering.plan import Sweep

_BEFORE = typer.Argument(metavar="A", help="A plan: what `moepass explain --format json` or MOEPASS_DUMP wrote.")
_AFTER = typer.Argument(metavar="B", help="The plan to compare it with.")


def diff(
    before: Annotated[Path, _BEFORE],
    after: Annotated[Path, _AFTER],
    format: Annotated[Output, typer.Option(help="How the result is printed.")] = Output.text,
) -> None:
    """Compare two plans: of two versions, shapes, settings or machines. Exit code 1 where a block is planned otherwise.

    Decisions count, not prices; the prices of what changed are shown beside it.
    """
    from moepass.explain import diff_text
    from moepass.explain.diff import diff as compare

    found = compare(read(before), read(after))
    typer.echo(found.to_json() if format is Output.json else diff_text.render(found), nl=False)
    if not found.same:
        raise typer.Exit(1)


def read(path: Path) -> PlanReport:
    """The report in a file.  Raises ``BadReport``, and ``BadOption`` for a file that cannot be read."""
    from moepass.explain.report import PlanReport

    try:
        text = path.read_bytes()
    except OSError as error:
        raise errors.BadOption(name="plan", value=str(path), detail=error.strerror or str(error)) from error
    try:
        return PlanReport.from_json(text)
    except errors.BadReport as error:
        raise errors.BadReport(detail=f"{path}: {error.fields['detail']}") from None


def sweep(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `moepass explain`, such as olmoe-1b-7b.")],
    hardware: Annotated[
        str | None, typer.Option(help="Presets or profiles, comma separated. Default: this machine.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Token counts. Default: powers of two from 1 to 65536.")] = None,
    routing: Annotated[str, typer.Option(help="random, balanced or skew=NUMBER, comma separated.")] = "random",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: MODEL's own.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Price forward and backward.")] = False,
    format: Annotated[Output, typer.Option(help="How the result is printed.")] = Output.text,
    chart: Annotated[Path | None, typer.Option(help="Also write the first sweep's chart here, as SVG.")] = None,
    mesh: cli_mesh.Meshes = None,
    ep: cli_mesh.Ep = None,
    tp: cli_mesh.Tp = None,
    link: cli_mesh.Link = None,
    same_tokens: cli_mesh.SameTokens = False,
    buffer_factor: cli_mesh.BufferFactor = None,
) -> None:
    """Price every lowering of MODEL's blocks over token counts, per machine and routing, and show where plans change.

    With --mesh: every form of expert parallelism instead. Estimates only; nothing is computed, no weights are needed.
    """
    counts, meshes = token_counts(tokens), cli_mesh.asked(mesh or [], ep, link, same_tokens, buffer_factor, tp)
    with contextlib.redirect_stdout(sys.stderr):  # whatever the user's code prints is not the result
        from moepass.preview.what_if import sweeps

        machines = [None] if hardware is None else [name.strip() for name in hardware.split(",")]
        routings = [r.strip() for r in routing.split(",")]
        found = sweeps(model, machines, routings, counts, dtype=dtype, train=train, meshes=meshes)
    if chart is not None:
        _write_chart(found, chart)
    from moepass.explain import sweep_text

    typer.echo(sweep_text.to_json(found) if format is Output.json else sweep_text.render(found), nl=False)


def write(path: Path, text: str, option: str) -> None:
    """Write a file in one step, and say so.  Raises ``BadOption`` where the path that ``option`` gave cannot be."""
    from moepass.explain.files import write_atomic

    try:
        write_atomic(path, text)
    except OSError as error:
        raise errors.BadOption(name=option, value=str(path), detail=error.strerror or str(error)) from error
    typer.echo(f"wrote {path}", err=True)


def _write_chart(found: Sequence[Sweep], path: Path) -> None:
    from moepass.explain.charts import time_chart

    if not found:
        raise errors.BadOption(name="--chart", value=str(path), detail="MODEL has no block that could be lowered")
    write(path, time_chart(found[0]) + "\n", "--chart")


def token_counts(text: str | None) -> tuple[int, ...]:
    """``"1,512"`` -> ``(1, 512)``, ascending, each once; none given: ``()``."""
    if text is None:
        return ()
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise errors.BadOption(name="--tokens", value=text, detail="give positive numbers, such as 1,512,8192")
    return tuple(counts)
