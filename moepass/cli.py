"""The command line: ``moepass explain``, ``verify``, ``diff``, ``sweep``, ``calibrate``, ``upcycle``, ...

Results go to stdout and nothing else does; logs, warnings, progress and errors go to stderr.  An error of moepass is
one line and exit code 2.  torch is imported inside the commands, so that ``moepass --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moepass import cli_calibrate, cli_emit, cli_mesh, cli_parallel, cli_plan, cli_upcycle, cli_verify, errors

if TYPE_CHECKING:
    from moepass.explain.report import PlanReport
    from moepass.explain.require import Requirement

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Plans how dense and mixture-of-experts feed-forward blocks are compiled.",
)


class Format(enum.StrEnum):
    """How a report is written."""

    text = "text"
    json = "json"
    html = "html"


def _version(wanted: bool) -> None:
    if wanted:
        import moepass

        typer.echo(f"moepass {moepass.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Plans how dense and mixture-of-experts feed-forward blocks are compiled."""


def _ours(error: BaseException) -> errors.MoepassError | None:
    """The moepass error itself, or the one that Dynamo wrapped."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, errors.MoepassError):
            return current
        seen.add(id(current))
        current = getattr(current, "inner_exception", None) or current.__cause__
    return None


def _with_clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, in which an error of moepass becomes one line on stderr and exit code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            ours = _ours(error)
            if ours is None:
                raise
            typer.echo(f"moepass: error: {' '.join(str(ours).split())}", err=True)
            raise typer.Exit(2) from None

    return run


@app.command()
@_with_clean_errors
def explain(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face model folder (config.json is enough), a published model such as olmoe-1b-7b, a .pt2 "
            "file, or module:function / file.py:function that returns a module or (module, example_args). The last one "
            "runs that code.",
        ),
    ],
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Token counts T to plan for, for instance 1,512,8192. Default: those, or MODEL's own example."
        ),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="A preset (H100, H200, B200, A100, MI300X) or a profile. Default: this machine.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: MODEL's own.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Price forward and backward.")] = False,
    format: Annotated[Format, typer.Option(help="How the report is written.")] = Format.text,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write here instead of to stdout.")] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Add the Triton kernels of blocks planned as fused, and what they need.")
    ] = False,
    experts: Annotated[int | None, typer.Option(help="Experts E that a dense block is turned into.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts K per token.")] = None,
    convert: Annotated[bool, typer.Option("--convert/--no-convert", help="Turn dense blocks into MoE.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a block that could be lowered is not.")] = False,
    routing: Annotated[
        str, typer.Option(help="What prices assume of the router: random, balanced, or skew=NUMBER (Zipf).")
    ] = "random",
    analyze: Annotated[
        bool,
        typer.Option(
            "--analyze",
            help="Run it as well, and show measured times, loads of the experts and memory beside the estimates.",
        ),
    ] = False,
    mesh: cli_mesh.Mesh = None,
    ep: cli_mesh.Ep = None,
    tp: cli_mesh.Tp = None,
    link: cli_mesh.Link = None,
    same_tokens: cli_mesh.SameTokens = False,
    buffer_factor: cli_mesh.BufferFactor = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="GLOB=LOWERING, such as '*.mlp=grouped': exit code 1 where the plan is otherwise. Repeatable."
        ),
    ] = None,
) -> None:
    """Show the plan of MODEL: every block, its lowering per token range, the price, and the alternatives.

    Nothing is computed and no weights are needed: the model is traced on the meta device. With --analyze a model that
    has weights runs, on its own example or random tokens; of a config the blocks alone run, on random operands. With
    --mesh the experts are spread over its ranks, and every way of doing that is priced.
    """
    counts, demands = cli_plan.token_counts(tokens), _demands(require or [])
    with contextlib.redirect_stdout(sys.stderr):  # whatever the user's code prints is not the report
        options = _options(hardware, experts, top_k, convert, strict)
        asked = cli_mesh.asked([mesh] if mesh is not None else [], ep, link, same_tokens, buffer_factor, tp)
        from moepass.preview.run import explain_target

        options |= {"analyze": analyze, "graphs": format is Format.html, **({"mesh": asked[0]} if asked else {})}
        report = explain_target(model, tokens=counts, dtype=dtype, train=train, routing=routing, **options)
        if kernels:
            report = _with_kernels(report)
    _write(report, format, output)
    _insist(report, demands)


def _options(
    hardware: str | None, experts: int | None, top_k: int | None, convert: bool, strict: bool
) -> dict[str, Any]:
    """Options for ``moepass.explain``: only what the user said, so that the defaults stay in one place."""
    options: dict[str, Any] = {}
    if hardware is not None:
        options["hardware"] = hardware
    if experts is not None or top_k is not None:
        options["spec"] = _spec(experts, top_k)
    if not convert:
        options["convert"] = False
    if strict:
        options["strict"] = True
    return options


def _with_kernels(report: PlanReport) -> PlanReport:
    from moepass.explain.kernels import ARCHITECTURES, with_kernels

    if report.hardware not in ARCHITECTURES:
        detail = f"{report.hardware} runs no Triton kernels; use --hardware {', '.join(ARCHITECTURES)}"
        raise errors.BadOption(name="--kernels", value=True, detail=detail)
    return with_kernels(report, ARCHITECTURES[report.hardware])


def _spec(experts: int | None, top_k: int | None) -> Any:
    from moepass.spec import ExpertSpec, MoESpec, RouterSpec

    for name, value in (("--experts", experts), ("--top-k", top_k)):
        if value is not None and value < 1:
            raise errors.BadOption(name=name, value=value, detail="give a number of at least 1")
    return MoESpec(
        router=RouterSpec() if top_k is None else RouterSpec(top_k=top_k),
        experts=ExpertSpec() if experts is None else ExpertSpec(num_experts=experts),
    )


def _write(report: PlanReport, format: Format, output: Path | None) -> None:
    """Print the report, or write it to a file in one step."""
    if output is None and format is Format.text and sys.stdout.isatty():
        from rich.console import Console

        from moepass.explain.text import renderable

        Console(emoji=False).print(renderable(report), highlight=False)
        return
    views = {Format.text: report.to_text, Format.json: report.to_json, Format.html: report.to_html}
    rendered = views[format]()
    if output is None:
        typer.echo(rendered, nl=False)
        return
    cli_plan.write(output, rendered, "--output")


def _demands(texts: list[str]) -> list[Requirement]:
    """What ``--require`` says, checked before anything is traced."""
    if not texts:
        return []
    from moepass.explain import require
    from moepass.lowering.registry import lowerings

    return [require.parse(text, lowerings()) for text in texts]


def _insist(report: PlanReport, demands: list[Requirement]) -> None:
    """Exit code 1, and a line on stderr for each demand that is not met."""
    if not demands:
        return
    from moepass.explain.require import unmet

    failures = unmet(report, demands)
    for line in failures:
        typer.echo(f"moepass: not met: {line}", err=True)
    if failures:
        raise typer.Exit(1)


app.command()(_with_clean_errors(cli_calibrate.calibrate))
app.command()(_with_clean_errors(cli_plan.diff))
app.command()(_with_clean_errors(cli_plan.sweep))
app.command()(_with_clean_errors(cli_verify.verify))
app.command()(_with_clean_errors(cli_emit.emit))
app.command()(_with_clean_errors(cli_parallel.gather))
app.command()(_with_clean_errors(cli_upcycle.upcycle))
app.command()(_with_clean_errors(cli_upcycle.verify_checkpoint))


if __name__ == "__main__":
    app()
