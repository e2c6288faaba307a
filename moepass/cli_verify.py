"""``moepass verify MODEL``: the checks of ``moepass.verify`` on a model that the command line names.

``moepass.cli`` registers the function and turns errors of moepass into one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from typing import Annotated

import typer

from moepass import errors
from moepass.cli_upcycle import Output

_MODEL = typer.Argument(
    metavar="MODEL",
    help="As for `moepass explain`, with weights: a Hugging Face folder (its safetensors, or random weights where it "
    "has none), a .pt2 file, or module:function / file.py:function. The last one runs that code.",
)


class Against(enum.StrEnum):
    """What the reference is."""

    eager = "eager"
    float64 = "float64"


def verify(
    model: Annotated[str, _MODEL],
    against: Annotated[Against, typer.Option(help="float64: a float64 copy; eager: a copy in MODEL's own dtype.")] = (
        Against.float64
    ),
    train: Annotated[
        bool, typer.Option("--train", help="Also losses, recompute, in-place updates and an optimizer step.")
    ] = False,
    ep: Annotated[
        int, typer.Option(help="Also every form of expert parallelism over this many gloo processes.", min=1)
    ] = 1,
    tokens: Annotated[int | None, typer.Option(help="Tokens T. Default: MODEL's own example, or 48.", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: MODEL's own.")] = None,
    inner: Annotated[str, typer.Option(help="Compiler of the rewritten graph: aot_eager, inductor, ...")] = "aot_eager",
    format: Annotated[Output, typer.Option(help="How the result is printed.")] = Output.text,
) -> None:
    """Check that moepass computes what MODEL computes: outputs and all gradients, lowering by lowering.

    Exit code 1 where a check fails, or where there was nothing to verify.
    """
    with contextlib.redirect_stdout(sys.stderr):  # whatever the user's code prints is not the result
        from moepass.explain import targets
        from moepass.verify.run import verify as run

        target = targets.load(model, dtype=targets.parse_dtype(dtype), train=train, real=True, drawn_weights=True)
        if target.source is None:
            remedy = "let it make weights on the CPU"
            raise errors.BadTarget(target=model, detail="its parameters are on the meta device", remedy=remedy)
        own = next(iter(target.tokens), None)
        args, kwargs = target.feed(tokens if tokens is not None else None if own is None else 48)
        options = {"inner": inner}
        report = run(
            target.model, *args, against=against.value, train=train, ep=ep, options=options, name=model, **kwargs
        )
    if format is Output.json:
        typer.echo(report.to_json(), nl=False)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console(emoji=False).print(report.renderable(), highlight=False)
    else:
        typer.echo(report.to_text(), nl=False)
    if not report.ok:
        raise typer.Exit(1)
