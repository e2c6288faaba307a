"""Links between ranks: what a collective over one dimension of a mesh costs.

Contract
    ``Link.seconds(collective, sent, ranks) = latency * ceil(log2(ranks)) + sent / bandwidth``, and for an all-to-all
    ``gap`` for each message that leaves a rank
    ``sent``        bytes that one rank sends to the others, which is what it receives too
    ``bandwidth``   bytes/s of one rank in one direction, attained, not what a data sheet says
    ``latency``     seconds of one of the log2(ranks) steps of a doubling algorithm
    ``gap``         seconds between two messages of a rank
Source: Hockney 1994 (alpha-beta); Alexandrov et al. 1995 (LogGP: the gap); Thakur,
Rabenseifner, Gropp 2005 for the steps of recursive doubling and Bruck.

The presets are assumptions with their sources; ``moepass calibrate --dist`` measures this machine's and keeps them in
the cache directory, one alpha-beta for each collective.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from moepass import errors
from moepass.frozen import Frozen
from moepass.lowering import cache, given_profile

log = logging.getLogger(__name__)

Collective = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce"]
COLLECTIVES: tuple[Collective, ...] = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
#: Rank counts for which a calibrated profile is looked up.
MOST_CALIBRATED = 64


class Fit(Frozen):
    """Alpha-beta of one collective, measured.

    ``error``  median relative error of the fit over the sizes that it was made from
    """

    collective: Collective
    latency: float = Field(ge=0)
    bandwidth: float = Field(gt=0)
    error: float = Field(0.0, ge=0)


class Link(Frozen):
    """One kind of link.  ``fits`` replace ``latency`` and ``bandwidth`` for the collectives that they name."""

    name: str
    bandwidth: float = Field(gt=0, allow_inf_nan=False)
    latency: float = Field(ge=0, allow_inf_nan=False)
    gap: float = Field(0.0, ge=0, allow_inf_nan=False)
    fits: tuple[Fit, ...] = ()
    source: Literal["preset", "calibrated", "file"] = "file"
    comment: str = ""

    def seconds(self, collective: Collective, sent: float, ranks: int) -> float:
        """Seconds of one collective among ``ranks`` ranks of which each sends ``sent`` bytes; 0 for one rank."""
        if ranks <= 1:
            return 0.0
        latency, bandwidth = self._rates(collective)
        return latency * steps(ranks) + sent / bandwidth

    def start(self, collective: Collective, ranks: int) -> float:
        """The part of ``seconds`` that does not depend on the bytes."""
        return self.seconds(collective, 0.0, ranks)

    def _rates(self, collective: Collective) -> tuple[float, float]:
        found = next((fit for fit in self.fits if fit.collective == collective), None)
        return (self.latency, self.bandwidth) if found is None else (found.latency, found.bandwidth)


def steps(ranks: int) -> int:
    """``ceil(log2(ranks))``: messages that follow one another."""
    return (ranks - 1).bit_length()


def _preset(name: str, bandwidth: float, latency: float, gap: float, comment: str) -> Link:
    return Link(name=name, bandwidth=bandwidth, latency=latency, gap=gap, source="preset", comment=comment)


_NVLINK = (
    "2/3 of the vendor's rate per direction, {}; reference/kernels.md 2.1 plans H200 with 300 of 450 GB/s; assumed"
)
_HOP = "; 6 us a step and 0.5 us a message: 20 us among 8 ranks (assumed, reference/kernels.md 2.1)"
_IB = "0.9 of the line rate, {}, a card for each GPU; 10 us a step and 1.5 us a message: 60 us among 16; assumed"
_PCIE = "0.8 of the x16 rate per direction, {}, through the host; 10 us a step; assumed"

#: Every preset, by name.
PRESETS = {
    link.name: link
    for link in (
        _preset("nvlink3", 200e9, 6e-6, 0.5e-6, _NVLINK.format("300 GB/s (A100)") + _HOP),
        _preset("nvlink4", 300e9, 6e-6, 0.5e-6, _NVLINK.format("450 GB/s (H100, H200)") + _HOP),
        _preset("nvlink5", 600e9, 6e-6, 0.5e-6, _NVLINK.format("900 GB/s (B200)") + _HOP),
        _preset("xgmi", 300e9, 6e-6, 0.5e-6, "2/3 of 448 GB/s per direction (MI300X: 7 links of 64); assumed" + _HOP),
        _preset("pcie4", 25.6e9, 10e-6, 1e-6, _PCIE.format("32 GB/s")),
        _preset("pcie5", 51.2e9, 10e-6, 1e-6, _PCIE.format("64 GB/s")),
        _preset("ib-hdr", 22.5e9, 10e-6, 1.5e-6, _IB.format("25 GB/s (200 Gb/s)")),
        _preset("ib-ndr", 45e9, 10e-6, 1.5e-6, _IB.format("50 GB/s (400 Gb/s)")),
        _preset("ib-xdr", 90e9, 10e-6, 1.5e-6, _IB.format("100 GB/s (800 Gb/s)")),
        _preset("ethernet", 2.8e9, 40e-6, 10e-6, "0.9 of 25 Gb/s; 40 us a step through the kernel; assumed"),
        _preset(
            "gloo", 1e9, 150e-6, 0.0, "processes of one machine over loopback TCP; assumed, `moepass calibrate --dist`"
        ),
    )
}
#: What a short name means where the hardware does not say.
ALIASES = {"nvlink": "nvlink4", "pcie": "pcie5", "ib": "ib-ndr", "infiniband": "ib-ndr", "loopback": "gloo"}
#: Inside a node, and between nodes, of the machines that presets describe.
WITHIN = {"A100": "nvlink3", "H100": "nvlink4", "H200": "nvlink4", "B200": "nvlink5", "MI300X": "xgmi"}
BETWEEN = {"A100": "ib-hdr"}


def link(name: str) -> Link:
    """A preset, an alias, or the JSON file of a link.  Raises ``UnknownLink`` and ``BadProfile``."""
    lowered = name.strip().lower()
    if found := PRESETS.get(ALIASES.get(lowered, lowered)):
        return found
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        return given_profile.read(Link, path)
    near = difflib.get_close_matches(lowered, [*PRESETS, *ALIASES], n=1, cutoff=0.5)
    suggestion = f" (did you mean {near[0]!r}?)" if near else ""
    raise errors.UnknownLink(name=name, suggestion=suggestion, known=", ".join(PRESETS))


def default(hardware: str, device: str, *, between_nodes: bool, ranks: int) -> Link:
    """The link that is assumed where none is named.

    A CPU's ranks: the calibrated profile nearest to ``ranks``, else ``gloo`` within and ``ethernet`` between nodes.
    An accelerator: that of its preset; one without: PCIe within and 400 Gb/s InfiniBand between nodes.
    """
    known = None if between_nodes else calibrated(device, ranks)
    return known or assumed(hardware, device, between_nodes=between_nodes)


def assumed(hardware: str, device: str, *, between_nodes: bool) -> Link:
    """As ``default``, presets only: the same in every process, whatever has been measured there."""
    if device in ("cpu", "meta"):
        return PRESETS["ethernet" if between_nodes else "gloo"]
    return PRESETS[BETWEEN.get(hardware, "ib-ndr") if between_nodes else WITHIN.get(hardware, "pcie5")]


def describe(device: str, ranks: int) -> dict[str, str]:
    """What a calibrated link depends on: the machine, the versions, and how many ranks share it."""
    from moepass.lowering import machine  # needs torch, which a report does not

    facts = {key: value for key, value in machine.describe(device).items() if key != "threads"}
    return facts | {"ranks": str(ranks)}


def profile_file(device: str, ranks: int) -> str:
    """Name of the cache file that holds the calibrated links among ``ranks`` ranks of this machine."""
    text = json.dumps(describe(device, ranks), sort_keys=True)
    return f"links-{device}-{ranks}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def save(found: Link, device: str, ranks: int) -> Path | None:
    """Keep a calibrated link beside the machine's profile; None where the cache cannot be written."""
    content = {"machine": describe(device, ranks), "link": found.model_dump(mode="json")}
    path = cache.write(profile_file(device, ranks), content)
    forget()
    return path


def forget() -> None:
    """Make the next ``calibrated`` look at the cache directory again."""
    _calibrated.cache_clear()


def calibrated(device: str, ranks: int) -> Link | None:
    """This machine's measured links: for ``ranks`` ranks, else for the nearest number of them; None where none fits."""
    return _calibrated(device, ranks, str(cache.directory()))


@functools.lru_cache(maxsize=128)
def _calibrated(device: str, ranks: int, folder: str) -> Link | None:
    have = [P for P in range(2, MOST_CALIBRATED + 1) if Path(folder, profile_file(device, P)).exists()]
    for P in sorted(have, key=lambda P: (abs(math.log(P / max(ranks, 2))), P)):
        found = _load(device, P)
        if found is not None:
            return found
    return None


def _load(device: str, ranks: int) -> Link | None:
    content = cache.read(profile_file(device, ranks))
    if content is None:
        return None
    if content.get("machine") != describe(device, ranks):
        log.warning("ignoring the calibrated links %s: made on another machine", profile_file(device, ranks))
        return None
    try:
        return Link.model_validate(content.get("link"))
    except ValidationError as error:
        log.warning("ignoring the calibrated links %s: %s", profile_file(device, ranks), errors.first_line(error))
        return None
