"""What the benchmarks share: interleaved medians, the name of the machine, and results that are written whole.

Results go to ``benchmarks/results/<name>.json`` (every number) and ``<name>.md`` (the table); both say on which
machine, with which versions and with how many repeats they were made.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of one side: median and quartiles over ``repeats`` calls."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarise samples; the quartiles of fewer than two are the sample itself."""
        if len(seconds) < 2:
            return cls(seconds[0], seconds[0], seconds[0], len(seconds))
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


def interleaved(sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """Time the sides in turns, so that drift and neighbours on the machine hit all alike; the first turns only warm up.

    The order is reversed every other turn: whoever follows the side that fills the caches is not always the same.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + repeats):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            start = time.perf_counter()
            sides[name]()
            seconds = time.perf_counter() - start
            if turn >= warmup:
                samples[name].append(seconds)
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def own_frame(function: Callable[..., Any], name: str) -> types.FunctionType:
    """``function`` with a code object of its own, under ``name``.

    Dynamo keeps the compiled graphs of one code object in one list with one limit: sides that shared it would pay for
    each other's guards, and push each other out.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


def own_forward(module: nn.Module, name: str) -> nn.Module:
    """The module, now of a subclass whose ``forward`` is a code object of its own (``own_frame``)."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": own_frame(kind.forward, name)})
    return module


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log)); values are positive."""
    return math.exp(sum(map(math.log, values)) / len(values))


def machine() -> dict[str, str | int]:
    """Processor, cores, memory, and the versions that decide speed."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "moepass": _version("moepass"),
        "load": f"{os.getloadavg()[0]:.1f} when the run began",
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with equal keys as a Markdown table."""
    if not rows:
        return "(no rows)\n"
    columns = list(rows[0])
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_cell(row[column]) for column in columns) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def pyplot(path: Path, salt: str) -> Any:
    """matplotlib's pyplot for an SVG that is the same for the same rows; None where it is missing, which is said.

    ``salt`` makes the ids in it; a chart is no reason to lose what was measured.
    """
    try:
        import matplotlib
    except ImportError:
        print(f"no chart: {path.name} needs matplotlib")
        return None
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}
    from matplotlib import pyplot as found

    return found


def write(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    notes: Sequence[str] = (),
    about: Mapping[str, str | int] | None = None,
    out: Path | None = None,
    extra: Mapping[str, Any] | None = None,
    summary: Sequence[Sequence[Mapping[str, Any]]] = (),
) -> Path:
    """Write the JSON and Markdown of one benchmark by rename; print the table; returns the path of the Markdown.

    ``about``    the machine, as ``machine()`` described it when the run began; ``extra``: more of the JSON alone
    ``summary``  tables that stand before the rows, in the Markdown alone
    """
    about = machine() if about is None else about
    folder = RESULTS if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    text = f"# {title}\n\n" + "".join(f"{table(part)}\n" for part in (*summary, rows))
    text += "".join(f"- {note}\n" for note in notes)
    text += "- machine: " + ", ".join(f"{key} {value}" for key, value in about.items()) + "\n"
    content = {"name": name, "title": title, "machine": about, "notes": list(notes), "rows": [dict(r) for r in rows]}
    content |= extra or {}
    _replace(folder / f"{name}.json", json.dumps(_json(content), indent=1) + "\n")
    _replace(folder / f"{name}.md", text)
    print(text)
    return folder / f"{name}.md"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _json(value: Any) -> Any:
    """The value for JSON, which has no NaN: null."""
    if isinstance(value, Mapping):
        return {key: _json(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
