"""``moepass upcycle`` and ``moepass verify-checkpoint``: dense Hugging Face folders become MoE folders.

``moepass.cli`` registers these functions and turns errors of moepass into one line and exit code 2.
Exit code 1: a method that should be exact is not.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moepass import errors

if TYPE_CHECKING:
    from moepass.upcycle.checkpoint.writer import Progress

_SRC = typer.Argument(metavar="SRC", help="A dense Hugging Face folder with safetensors. Never written to.")
_DST = typer.Argument(metavar="DST", help="The folder to write: new, or empty.")


class Output(enum.StrEnum):
    """How a result is printed."""

    text = "text"
    json = "json"


def upcycle(
    src: Annotated[Path, _SRC],
    dst: Annotated[Path, _DST],
    experts: Annotated[
        int | None, typer.Option(help="Experts E of each block. Default: 8, or one per parent.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option(help="Experts K that a token uses.")] = 2,
    init: Annotated[str, typer.Option(help="copy, virtual-groups, noise, drop, split or cluster.")] = "copy",
    granularity: Annotated[int, typer.Option(help="virtual-groups: shards that one dense block is cut into.")] = 2,
    noise_std: Annotated[float, typer.Option(help="noise: relative to the weights' standard deviation.")] = 0.05,
    drop_ratio: Annotated[float, typer.Option(help="drop: share of channels that are drawn anew.")] = 0.5,
    drop_indices: Annotated[
        str, typer.Option(help="drop: shared, one set of channels for gate, up and down; or independent sets.")
    ] = "shared",
    cluster_on: Annotated[
        str, typer.Option(help="cluster: weights, or activations of the calibration text.")
    ] = "weights",
    shared: Annotated[
        int, typer.Option(help="split, cluster: number of neurons, the most active ones, for the shared expert.")
    ] = 0,
    calibration: Annotated[
        Path | None, typer.Option(help="Text that neurons are observed on: its first 4096 tokens.")
    ] = None,
    calibration_tokens: Annotated[
        str | None, typer.Option(help="Token ids instead: 1,15043,3186, or a .json file with lists of ids.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="The MoE model_type, or moepass. Default: that of the family (docs/upcycle.md).")
    ] = None,
    layers: Annotated[str, typer.Option(help="Globs over model.layers.N.mlp, comma separated.")] = "*",
    router: Annotated[
        str, typer.Option(help="orthogonal, normal, uniform, centroids, prompts or zero.")
    ] = "orthogonal",
    router_std: Annotated[float, typer.Option(help="Standard deviation of the router's logits at step 0.")] = 0.1,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="--router prompts: JSON, for each expert a list of texts or token-id lists."),
    ] = None,
    experts_from: Annotated[
        list[Path] | None,
        typer.Option(metavar="PARENT", help="A fine-tune of SRC's base that gives an expert. Repeat for each parent."),
    ] = None,
    others: Annotated[
        str | None,
        typer.Option(help="With parents, the other weights: average (of the parents; default) or base (SRC)."),
    ] = None,
    renormalize: Annotated[
        bool, typer.Option("--renormalize/--no-renormalize", help="Whether the K weights of a token sum to 1.")
    ] = True,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as in SRC.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 500MB or 5GB.")] = "5GB",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run of this very command.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, check and print; write nothing.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare SRC and DST afterwards, layer by layer.")] = False,
    format: Annotated[Output, typer.Option(help="How the result is printed.")] = Output.text,
) -> None:
    """Turn the dense checkpoint SRC into a mixture-of-experts checkpoint DST that stock transformers loads.

    With --to moepass it becomes one that moepass.load reads, for models that have no MoE architecture in transformers.

    The default (copies, 8 experts, top-2) computes the dense function exactly. Nothing is loaded whole: memory does not
    grow with the model.
    """
    from moepass.upcycle.checkpoint.memory import use_huge_pages
    from moepass.upcycle.command import upcycle_checkpoint

    use_huge_pages()
    with _bar(enabled=not dry_run) as progress:
        report = upcycle_checkpoint(
            src,
            dst,
            to=to,
            init=init,
            experts=experts,
            top_k=top_k,
            granularity=granularity,
            noise_std=noise_std,
            drop_ratio=drop_ratio,
            drop_indices=drop_indices,
            cluster_on=cluster_on,
            shared=shared,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            router=router,
            router_std=router_std,
            prompts=prompts,
            experts_from=experts_from or (),
            others=others,
            renormalize=renormalize,
            layers=layers,
            dtype=dtype,
            seed=seed,
            max_shard_size=max_shard_size,
            resume=resume,
            dry_run=dry_run,
            verify=verify,
            progress=progress,
        )
    if format is Output.json:
        typer.echo(report.to_json(), nl=False)
    else:
        typer.echo(str(report))
        if report.verified is not None:
            typer.echo(str(report.verified))
    if report.written is not None:
        typer.echo(f"wrote {dst} in {report.written.seconds:.1f} s", err=True)
    if report.broken:
        raise typer.Exit(1)


def verify_checkpoint(
    src: Annotated[Path, _SRC],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="What `moepass upcycle SRC DST` wrote.")],
    tokens: Annotated[
        str | None, typer.Option(help="Token ids to try besides random ones, such as 1,15043,3186.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest |logit difference| relative to the logits. Default: 5e-6.")
    ] = None,
    format: Annotated[Output, typer.Option(help="How the result is printed.")] = Output.text,
) -> None:
    """Compare SRC and DST in float32, one layer in memory at a time: hidden states, logits, KL, router balance.

    Exit code 1 where they differ, unless DST's own report says that its method is not exact.
    """
    from moepass.upcycle.checkpoint.verify import verify

    options: dict[str, Any] = {} if tolerance is None else {"tolerance": tolerance}
    report = verify(src, dst, token_ids=_token_ids(tokens), **options)
    typer.echo(report.to_json() if format is Output.json else str(report), nl=format is Output.text)
    if not report.passed and _should_be_exact(dst):
        raise typer.Exit(1)


def _token_ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise errors.BadOption(name="--tokens", value=text, detail="give ids such as 1,15043,3186") from None


def _should_be_exact(dst: Path) -> bool:
    """What DST's report promises; a folder without one is held to the standard."""
    try:
        return bool(json.loads((dst / "moepass_upcycle.json").read_text())["verdict"]["exact"])
    except (OSError, ValueError, KeyError, TypeError):
        return True


@contextmanager
def _bar(*, enabled: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A progress bar over bytes on stderr."""
    if not enabled:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("writing", total=None)
        yield lambda step: bar.update(task, completed=step.done, total=step.total)
