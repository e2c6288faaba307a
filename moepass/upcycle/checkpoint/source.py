"""A Hugging Face folder, opened: config, the tensors' byte ranges, nothing of the weights.

Contract
    in    a folder with config.json and model.safetensors, or shards with model.safetensors.index.json
    out   ``Source``: every header checked against its file and against the index; refused: pickled, quantised, damaged
          or contradictory checkpoints, and paths that leave the folder
    ``read`` and ``pieces`` copy into fresh memory (no mmap: a file that shrinks meanwhile is an error, not a crash).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moepass.upcycle.checkpoint.headers import bad, read_headers
from moepass.upcycle.checkpoint.tensors import FLOATS, PIECE, Header, torch_dtype


def single(stem: str = "model") -> str:
    """Name of the only file with tensors."""
    return f"{stem}.safetensors"


def index_of(stem: str = "model") -> str:
    """Name of the index where there are several."""
    return f"{stem}.safetensors.index.json"


_RESAVE = (
    'resave it once: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('SRC').save_pretrained('NEW')\", then use NEW"
)
_GIVE_FOLDER = "give the folder of a Hugging Face checkpoint"
_DEQUANTISE = "start from the unquantised checkpoint and quantise the MoE afterwards"
#: Last part of a tensor's name -> who writes such tensors (GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8, HQQ).
_QUANTISED = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "nested_absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_format": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or ModelOpt",
    "weight_zero_point": "compressed-tensors",
    "weight_scale_inv": "block-wise FP8",
    "W_q": "HQQ",
}


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.  Make it with ``Source.open``.

    ``config``   config.json as it stands
    ``headers``  name -> ``Header``, in the order of the shards and of the bytes in them
    ``state``    file -> (size, time of last change in ns): what ``check_unchanged`` compares
    """

    folder: Path
    config: dict[str, Any]
    headers: dict[str, Header]
    state: dict[Path, tuple[int, int]]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, stem: str = "model") -> Source:
        """Read config, index and headers, and check them.  ``stem``: how files begin.  Raises ``BadCheckpoint``."""
        root = Path(folder)
        if not root.is_dir():
            bad(root, "no_folder", "there is no such folder", _GIVE_FOLDER)
        config = _read_json(root / "config.json")
        _refuse_quantised_config(root / "config.json", config)
        files, index = _files(root, stem)
        state = {path: _state(path) for path in files}
        headers = _merge(root / index_of(stem), {path: read_headers(path) for path in files}, index)
        for header in headers.values():
            _refuse_quantised(header)
        return cls(root, config, headers, state)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(h.nbytes for h in self.headers.values())

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """The tensor, or its rows ``begin:end`` alone, on the CPU, in its own dtype.

        Raises ``BadCheckpoint`` where the file has changed.
        """
        header = self.headers[name]
        shape = header.shape if end is None else (end - begin, *header.shape[1:])
        out = torch.empty(shape, dtype=torch_dtype(header.dtype))
        if out.numel():
            with header.file.open("rb") as file:
                file.seek(_offset(header, begin))
                _fill(out, file, header)
        return out

    def pieces(self, name: str, rows: tuple[int, int] | None = None) -> Iterator[Tensor]:
        """The same bytes as ``tensors.Pieces`` tells; each in fresh memory."""
        header = self.headers[name]
        left = header.elements(rows)
        with header.file.open("rb") as file:
            file.seek(_offset(header, rows[0] if rows else 0))
            for n in [PIECE] * (left // PIECE) + [left % PIECE] * (left % PIECE > 0):
                out = torch.empty(n, dtype=torch_dtype(header.dtype))
                _fill(out, file, header)
                yield out

    def check_unchanged(self) -> None:
        """Raise ``BadCheckpoint`` where a file is not the one that was opened (size and time)."""
        for path, before in self.state.items():
            if _state(path) != before:
                bad(path, "changed", "it was changed while it was being read", "start again, without --resume")


def _offset(header: Header, row: int) -> int:
    """Where that row begins in the file."""
    return header.begin + (header.nbytes // header.shape[0] * row if row else 0)


def _fill(out: Tensor, file: BinaryIO, header: Header) -> None:
    view = out.reshape(-1).view(torch.uint8).numpy().data
    if file.readinto(view) != len(view):  # type: ignore[attr-defined]  # typeshed's BinaryIO has no readinto
        detail = f"it ended while {header.name!r} was read"
        bad(header.file, "changed", detail, "do not touch SRC during a run")


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as e:
        bad(path, "unreadable", f"{e.strerror}", "check that the file is there and readable")
    return status.st_size, status.st_mtime_ns


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        bad(path, "missing", "there is no such file", _GIVE_FOLDER)
    except OSError as e:
        bad(path, "unreadable", f"{e.strerror}", "check that the file is readable")
    except (ValueError, RecursionError) as e:
        bad(path, "json", f"it is not JSON ({e})")
    if not isinstance(content, dict):
        bad(path, "json", "it is not a JSON object")
    return content


def _files(root: Path, stem: str) -> tuple[list[Path], dict[str, Path] | None]:
    """Files with tensors, and the index where there is one.  A single file wins, as in transformers."""
    alone, listed = single(stem), index_of(stem)
    if (root / alone).exists() or (root / alone).is_symlink():
        return [_inside(root, root / alone, alone)], None
    if (root / listed).exists():
        index = _read_index(root / listed)
        return sorted(set(index.values())), index
    shards = sorted(p.name for p in root.glob("*.safetensors"))
    if shards:
        bad(root, "no_index", f"{shards[0]} is there, {listed} is not", "restore the index, or save the model again")
    pickled = sorted(p.name for p in root.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        bad(root, "pickled", f"it holds pickled weights ({pickled[0]}), no safetensors", _RESAVE)
    return bad(root, "no_weights", f"it holds neither {alone} nor {listed}", _GIVE_FOLDER)


def _read_index(path: Path) -> dict[str, Path]:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        bad(path, "index", "it has no weight_map")
    files: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            bad(path, "index", f"{name!r} is in {file!r}, which is not a file name")
        if file not in files:
            files[file] = _shard(path.parent, path, file)
    return {name: files[file] for name, file in weight_map.items()}


def _shard(root: Path, index: Path, file: str) -> Path:
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts or PureWindowsPath(file).is_absolute() or "\\" in file or "\0" in file:
        bad(index, "path_escape", f"it names {file!r}, outside the folder", "do not use a checkpoint that you mistrust")
    path = root / file
    if not _exists(path):
        bad(index, "missing_shard", f"it names {file[:80]!r}, which is not there", "download the missing shard")
    return _inside(root, path, file)


def _exists(path: Path) -> bool:
    """Whether there is something; a name that no file can have is one that is not there."""
    try:
        return path.exists()
    except OSError:  # too long, for instance
        return False


def _inside(root: Path, path: Path, file: str) -> Path:
    """The path, if ``stays_inside`` says so."""
    if not stays_inside(root, path):
        detail = f"{file} is a link to {path.resolve()}, outside the folder"
        bad(path, "path_escape", detail, "put the file itself there")
    return path


def stays_inside(folder: Path, path: Path) -> bool:
    """Whether following links stays in the folder, or in the blobs of the Hub's cache that it is part of."""
    root = folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return any(path.resolve().is_relative_to(place) for place in allowed)


def _merge(listed: Path, found: dict[Path, list[Header]], index: dict[str, Path] | None) -> dict[str, Header]:
    headers: dict[str, Header] = {}
    for path, in_file in found.items():
        for header in in_file:
            if header.name in headers:
                other = headers[header.name].file.name
                bad(
                    path,
                    "duplicate",
                    f"{header.name!r} is also in {other}",
                    "remove one of the two and its index entry",
                )
            headers[header.name] = header
    if index is not None:
        _check_index(listed, headers, index)
    if not headers:
        bad(listed.parent, "no_weights", "its files hold no tensor")
    return headers


def _check_index(path: Path, headers: dict[str, Header], index: dict[str, Path]) -> None:
    for name, file in index.items():
        if name not in headers:
            bad(path, "index", f"it says that {name!r} is in {file.name}, which does not hold it")
        if headers[name].file != file:
            bad(path, "index", f"it says that {name!r} is in {file.name}; it is in {headers[name].file.name}")
    for name, header in headers.items():
        if name not in index:
            bad(path, "index", f"{header.file.name} holds {name!r}, which the index does not list")


def _refuse_quantised_config(path: Path, config: dict[str, Any]) -> None:
    nested = [(f"{key}.", value) for key, value in config.items() if isinstance(value, dict)]
    for prefix, part in [("", config), *nested]:
        for field in ("quantization_config", "compression_config"):
            if part.get(field):
                method = part[field].get("quant_method", "") if isinstance(part[field], dict) else part[field]
                bad(path, "quantised", f"{prefix}{field} is set ({method or 'unnamed method'})", _DEQUANTISE)


def _refuse_quantised(header: Header) -> None:
    parts = header.name.split(".")
    method = next((_QUANTISED[part] for part in parts[-2:] if part in _QUANTISED), None)
    if method is None and parts[-1] in {"weight", "bias"} and header.dtype not in FLOATS:
        method = f"an unknown method: {header.dtype} is no floating dtype of training"
    if method is not None:
        bad(header.file, "quantised", f"{header.name!r} was written by {method}", _DEQUANTISE)
