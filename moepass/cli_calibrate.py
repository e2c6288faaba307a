"""``moepass calibrate``: measure this machine, say what plans rest on here, or forget what was learned.

``moepass.cli`` registers this function and turns errors of moepass into one line and exit code 2.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from moepass import cli_mesh, errors


def calibrate(
    device: Annotated[str, typer.Option(help="cpu, or an accelerator such as cuda.")] = "cpu",
    show: Annotated[
        bool, typer.Option("--show", help="Measure nothing: say which profile and which measurements plans use here.")
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Measure nothing: forget the times that plans learned from.")
    ] = False,
    dist: cli_mesh.Dist = None,
) -> None:
    """Measure this machine (some seconds), keep the profile for later plans, and print it as JSON."""
    if show and forget:
        raise errors.BadOption(name="--show", value=True, detail="give either --show or --forget")
    if dist is not None and (show or forget):
        raise errors.BadOption(name="--dist", value=dist, detail="it measures; leave out --show and --forget")
    if dist is not None:
        typer.echo(cli_mesh.measured_links(dist, device) or "", nl=False)
        return
    if forget:
        from moepass.lowering import learned

        typer.echo(f"forgot the measured times of {learned.forget(device)} workloads")
        return
    typer.echo(json.dumps(_state(device), indent=2) if show else _measured(device))


def _measured(device: str) -> str:
    from rich.console import Console

    from moepass.lowering.calibrate import calibrate as measure

    with Console(stderr=True).status("measuring") as status:
        profile = measure(device, progress=lambda step: status.update(f"measuring {step}"))
    return profile.model_dump_json(indent=2)


def _state(device: str) -> dict[str, Any]:
    """What a plan without ``--hardware`` rests on."""
    from moepass.lowering import cache, hardware, learned

    profile = hardware.load_hardware(None, device)
    return {
        "profile": profile.name,
        "source": profile.source,
        "outdated": hardware.outdated(device) if profile.source != "calibrated" else None,
        "learning": learned.enabled(),
        "learned_workloads": len(profile.facts),
        "folder": str(cache.directory()),
    }
