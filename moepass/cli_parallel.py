"""``moepass gather``: a distributed checkpoint becomes files for one process.

``moepass.cli`` registers the function and turns errors of moepass into one line and exit code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def gather(
    src: Annotated[Path, typer.Argument(help="A folder that moepass.parallel.save_checkpoint wrote.")],
    dst: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    to: Annotated[
        str | None,
        typer.Option(help="A MoE model_type of transformers, or moepass. Default: a stock one where it fits."),
    ] = None,
) -> None:
    """Put a distributed checkpoint together, bit for bit, in this process alone.

    A model of transformers becomes a folder for from_pretrained, a converted one too where a stock MoE computes the
    same; else one for moepass.load. Any other model becomes one model.safetensors.
    """
    from moepass.parallel.gathering import BARE
    from moepass.parallel.gathering import gather as run
    from moepass.upcycle.own.schema import NAME

    found = run(src, dst, to=to)
    form = {BARE: "model.safetensors alone", NAME: "moepass's own format, for moepass.load"}
    typer.echo(
        f"{dst}: {len(found.names)} tensors, {form.get(found.form, f'a stock {found.form} for from_pretrained')}"
    )
    if found.why is not None:
        typer.echo(f"not a stock model: {found.why}")
