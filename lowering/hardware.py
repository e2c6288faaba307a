"""Hardware profiles: the constants of a machine that the cost model needs.

A profile is a frozen value.  It comes from a preset (``lowering/presets/*.json``, numbers with their sources), from
``moepass calibrate`` (this machine, kept in the cache directory), or from a JSON file of the same form.

Units: FLOP/s, bytes/s, seconds.  The rates are what large library GEMMs and copies attain, not what data sheets say.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from moepass import errors
from moepass.lowering import cache, given_profile, learned, machine
from moepass.lowering.facts import Fact, block
from moepass.lowering.plan import Workload

log = logging.getLogger(__name__)


def _pairs(value: object) -> object:
    """A mapping, or its pairs, as a sorted tuple of pairs: hashable, and equal after a round trip through JSON."""
    if isinstance(value, Mapping):
        return tuple(sorted(value.items()))
    return tuple(sorted(value)) if isinstance(value, tuple) else value


def _ascending(curve: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    rows = [x for x, _ in curve]
    if not rows or rows != sorted(set(rows)) or rows[0] <= 0 or any(y <= 0 for _, y in curve):
        raise ValueError("a curve needs positive values at one or more ascending, positive row counts")
    return curve


#: Values by name, given and stored as a JSON object: a dtype's FLOP/s, a package's version.
Rates = Annotated[tuple[tuple[str, float], ...], BeforeValidator(_pairs), PlainSerializer(dict)]
Names = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_pairs), PlainSerializer(dict)]
#: (rows, fraction of the peak) pairs, rows ascending.
Curve = Annotated[tuple[tuple[float, float], ...], AfterValidator(_ascending)]
Curves = Annotated[tuple[tuple[str, Curve], ...], BeforeValidator(_pairs), PlainSerializer(dict)]


class Hardware(BaseModel):
    """One machine, as the cost model sees it.

    ``flops``       attained FLOP/s of a large GEMM by dtype name
    ``bandwidth``   attained bytes/s of a large copy, reads and writes counted
    ``launch``      seconds per kernel (accelerator, inside a graph) or per aten op (CPU)
    ``tiles``       accelerator: rows of an M-tile -> fraction of ``flops`` that the grouped GEMM attains
    ``fused``       likewise in the fused kernels, whose tiles gather their rows
    ``dense``       fraction of ``flops`` in the all-experts GEMM; ``batched``: in a batched GEMM
    ``rows``        CPU: by dtype, rows per GEMM -> fraction of ``flops``, weights read from memory (not from cache)
    ``rows_backward``    likewise for the two GEMMs of a backward pass, dX and dW
    ``grouped``     CPU: as ``rows``, for rows per expert in the grouped GEMM of many experts (none: as ``rows``);
                    ``grouped_backward``: likewise backward
    ``matvec``      CPU: by dtype, bytes/s of weights in matrix-vector products
    ``matvec_backward``  likewise for dX (a read) and the rank-one update of dW (a read and a write)
    ``fresh``       CPU: bytes/s of the first write to newly allocated memory (page faults); None: not counted
    ``per_row``     CPU: seconds of dispatch per mat-vec; ``per_expert``: per GEMM in the loop over experts
    ``fixed``       CPU: seconds of dispatch of a forward pass by lowering, whatever the shapes (else launches count)
    ``sort_row``    seconds per routed row of sorting by expert; ``gather``: bytes/s of moving rows (None: a copy's)
    ``facts``       measured times of workloads on this machine, which correct estimates (``lowering.facts``)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    device: str
    flops: Rates = Field(min_length=1)
    bandwidth: float = Field(gt=0)
    launch: float = Field(ge=0)
    tiles: Curve = ((64.0, 0.6), (128.0, 0.7))
    fused: Curve = ((16.0, 0.15), (32.0, 0.28), (64.0, 0.5), (128.0, 0.6))
    dense: float = Field(0.85, gt=0, le=1)
    batched: float = Field(0.7, gt=0, le=1)
    rows: Curves = ()
    rows_backward: Curves = ()
    grouped: Curves = ()
    grouped_backward: Curves = ()
    matvec: Rates = ()
    matvec_backward: Rates = ()
    fresh: float | None = Field(None, gt=0)
    per_row: float = Field(0.0, ge=0)
    per_expert: float = Field(0.0, ge=0)
    fixed: Rates = ()
    sort_row: float = Field(0.0, ge=0)
    gather: float | None = Field(None, gt=0)
    facts: tuple[Fact, ...] = ()
    source: Literal["preset", "calibrated", "file"] = "file"
    versions: Names = ()
    comment: str = ""

    def __hash__(self) -> int:
        return hash((self.name, self.fingerprint))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Hardware:  # noqa: ARG002
        """Made and validated anew: pydantic's copy would keep the fingerprint of the original."""
        fields = {name: getattr(self, name) for name in Hardware.model_fields}
        return Hardware(**fields | dict(update or {}))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Short hash of every number of the profile."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    @functools.cached_property
    def _facts_of(self) -> dict[Workload, list[Fact]]:
        found: dict[Workload, list[Fact]] = {}
        for fact in self.facts:
            found.setdefault(fact.block, []).append(fact)
        return found

    def facts_of(self, work: Workload) -> Sequence[Fact]:
        """The facts of a workload's block, whatever the T.  On the meta device: as if it were on this machine's."""
        here = work if work.device != "meta" else work.model_copy(update={"device": self.device})
        return self._facts_of.get(block(here), ())

    def gather_seconds(self, size: float) -> float:
        """Seconds of moving ``size`` bytes row by row."""
        return size / (self.gather or self.bandwidth)

    def peak(self, dtype: str) -> float:
        """Attained FLOP/s of a large GEMM; a dtype without a number is taken as the slowest one."""
        return dict(self.flops).get(dtype) or min(rate for _, rate in self.flops)

    def rows_efficiency(self, dtype: str, rows: float, *, backward: bool = False, grouped: bool = False) -> float:
        """Fraction of ``peak`` in a GEMM of that many rows; interpolated over log(rows), constant outside (CPU)."""
        curves = (backward and self.rows_backward) or self.rows
        curves = (grouped and ((backward and self.grouped_backward) or self.grouped)) or curves
        curve = dict(curves).get(dtype)
        return 1.0 if curve is None else interpolate(curve, rows)

    def matvec_bandwidth(self, dtype: str, *, backward: bool = False) -> float:
        """Bytes/s of weights in matrix-vector products and, backward, in rank-one updates too."""
        return dict((backward and self.matvec_backward) or self.matvec).get(dtype, self.bandwidth)

    def dispatch(self, lowering: str, launches: int) -> float:
        """Seconds of dispatch of one forward pass: the lowering's own figure if there is one, else by launches."""
        return dict(self.fixed).get(lowering, launches * self.launch)

    @classmethod
    def preset(cls, name: str) -> Hardware:
        """A profile that ships with moepass; names ignore case.  Raises ``UnknownHardware``."""
        found = {known.lower(): known for known in preset_names()}.get(name.lower())
        if found is None:
            raise _unknown(name)
        return cls.model_validate_json(_preset_folder().joinpath(f"{found}.json").read_text(encoding="utf-8"))


def interpolate(curve: tuple[tuple[float, float], ...], rows: float) -> float:
    """The curve's value at ``rows``, linear in log(rows) between its points and constant outside them."""
    if rows <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if rows <= x1:
            return y0 + (y1 - y0) * math.log(rows / x0) / math.log(x1 / x0)
    return curve[-1][1]


@functools.cache
def preset_names() -> tuple[str, ...]:
    """The presets that ship with moepass."""
    return tuple(
        sorted(path.name.removesuffix(".json") for path in _preset_folder().iterdir() if path.name[-5:] == ".json")
    )


def load_hardware(name: str | Path | None = None, device: str = "cpu") -> Hardware:
    """The profile to plan with.

    ``name``  a preset, the path of a profile, or None: this machine's calibrated profile where one is cached and was
              made with the present versions and thread count, else the preset nearest to ``device``.
    Raises ``UnknownHardware`` for a name that is neither, ``BadProfile`` for a file that does not hold a profile.
    """
    if name is None:
        threads = torch.get_num_threads() if device == "cpu" else 0
        return _default(device, threads, str(cache.directory()))
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        return _from_file(path)
    return Hardware.preset(str(name))


def profile_file(device: str) -> str:
    """Name of the cache file that holds the calibrated profile of this machine."""
    return f"hardware-{device}-{machine.fingerprint(device)}.json"


def forget_default() -> None:
    """Make the next ``load_hardware(None)`` look at the cache directory again."""
    _default.cache_clear()


@functools.lru_cache(maxsize=32)
def _default(device: str, threads: int, folder: str) -> Hardware:  # noqa: ARG001 (they are the cache's key)
    found = calibrated(device)
    if found is None and (stale := outdated(device)) is not None:
        log.warning("%s", stale)
    found = found or nearest_preset(device)
    facts = learned.load(device)
    return found.model_copy(update={"facts": facts}) if facts else found


def remember(device: str, facts: Iterable[Fact]) -> None:
    """Keep what was measured on this machine: later plans take it into account."""
    if learned.record(device, facts):
        forget_default()


def outdated(device: str) -> str | None:
    """A sentence where this machine has profiles, but none for the present processor, threads and versions."""
    present = machine.describe(device)
    for path in sorted(cache.directory().glob(f"hardware-{device}-*.json")):
        other = (cache.read(path.name) or {}).get("machine")
        if isinstance(other, dict):
            changed = [f"{k} {other.get(k)} then, {v} now" for k, v in present.items() if other.get(k) != v]
            if changed:
                detail = f"was calibrated on something else ({'; '.join(changed)})"
                return f"the profile {path.name} {detail}, so plans use a preset; run `moepass calibrate`"
    return None


def calibrated(device: str) -> Hardware | None:
    """The cached profile of this machine, or None where there is none, or it is damaged, stale or from elsewhere."""
    content = cache.read(profile_file(device))
    if content is None:
        return None
    if content.get("machine") != machine.describe(device):
        log.warning("ignoring the calibrated profile %s: it was made on another machine", profile_file(device))
        return None
    try:
        return Hardware.model_validate(content.get("profile"))
    except ValidationError as error:
        log.warning("ignoring the calibrated profile %s: %s", profile_file(device), error)
        return None


def nearest_preset(device: str) -> Hardware:
    """The preset of this machine's accelerator by its name; H100's (logged) where none fits; ``cpu`` for a CPU."""
    if device in ("cpu", "meta"):
        return Hardware.preset("cpu")
    processor = torch.cuda.get_device_name().upper() if device == "cuda" and torch.cuda.is_available() else ""
    for name in preset_names():
        if name.upper() in processor:
            return Hardware.preset(name)
    log.warning("no profile for %s; planning with H100's, `moepass calibrate` measures this one", processor or device)
    return Hardware.preset("H100")


def _from_file(path: Path) -> Hardware:
    found = given_profile.read(Hardware, path)
    if found.source == "calibrated" and dict(found.versions) != machine.describe(found.device):
        log.warning("the profile %s was calibrated on another machine, or with other versions or threads", path)
    return found


def _unknown(name: str) -> errors.UnknownHardware:
    lowered = {known.lower(): known for known in preset_names()}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    suggestion = f" (did you mean {lowered[near[0]]!r}?)" if near else ""
    return errors.UnknownHardware(name=name, suggestion=suggestion, known=", ".join(preset_names()))


def _preset_folder() -> Any:
    return resources.files("moepass.lowering") / "presets"
