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
) -> None:
    """Put a distributed checkpoint together, bit for bit, in this process alone.

    A converted model of transformers becomes a folder for moepass.load, any other model one model.safetensors.
    """
    from moepass.parallel.checkpoint import gather as run

    names = run(src, dst)
    typer.echo(f"{dst}: {len(names)} tensors")
