"""The small files of a checkpoint: which go along, and with what content.

Everything small that is not weights, config or code is copied: tokenizer, chat template, generation settings, licence.
"""

from __future__ import annotations

import json
from pathlib import Path

from moepass import errors
from moepass.upcycle.checkpoint.source import stays_inside

#: Larger files are not the tokenizer's.
MAX_BYTES = 64 << 20
#: Written anew, or about the dense weights only.
_OURS = {"config.json", "README.md", "moepass_upcycle.json", "moepass.json", "model.safetensors.index.json"}
_WEIGHTS = {".safetensors", ".partial", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz"}
_CODE = {".py", ".pyc", ".so"}


def small_files(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """``(name -> content, warnings)`` of what goes along.  Raises ``BadCheckpoint`` for a file that cannot be read."""
    found: dict[str, bytes] = {}
    warnings: list[str] = []
    for path in sorted(folder.iterdir()):
        why = _left_out(folder, path)
        if why is None:
            found[path.name] = _read(path)
        elif why:
            warnings.append(f"{path.name} was not copied: {why}")
    return found, warnings


def _left_out(folder: Path, path: Path) -> str | None:
    """None: it goes along; otherwise why not, empty where nobody would ask."""
    if path.name in _OURS or path.name.startswith(".") or path.suffix in _WEIGHTS or path.name.endswith(".index.json"):
        return ""
    if not path.is_file():
        return ""
    if path.suffix in _CODE:
        return "code of the dense model; the output runs on stock transformers"
    if not stays_inside(folder, path):
        return "it is a link that leaves the folder"
    if path.stat().st_size > MAX_BYTES:
        return f"it is larger than {MAX_BYTES >> 20} MiB"
    return None


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        remedy = "check that the file is readable"
        raise errors.BadCheckpoint(path=path, reason="unreadable", detail=f"{error.strerror}", remedy=remedy) from error
    if path.name == "generation_config.json":
        _check_json(path, content)
    return content


def _check_json(path: Path, content: bytes) -> None:
    try:
        json.loads(content)
    except ValueError as error:
        detail, remedy = f"it is not JSON ({error})", "correct or remove it"
        raise errors.BadCheckpoint(path=path, reason="json", detail=detail, remedy=remedy) from error
