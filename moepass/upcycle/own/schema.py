"""``config.json`` and ``moepass.json`` of moepass's own format: what is written, and what is refused on reading.

Contract
    out   JSON bytes that depend on their content alone
    in    any two files: wrong ones raise ``BadMoEFolder`` with the file, the field and what to do
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

import moepass
from moepass import errors
from moepass.nn.moe import MoE
from moepass.nn.origin import Origin
from moepass.spec import MoESpec

#: ``model_type`` in config.json, and ``--to``.
NAME = "moepass"
MANIFEST = "moepass.json"
#: Weights are ``moepass.safetensors``, or shards with an index of that name.
STEM = "moepass"
SCHEMA_VERSION = 1

_GIVE = "give a folder that moepass.save or `moepass upcycle --to moepass` wrote"


class Block(BaseModel):
    """One MoE: its width, its spec, and the dense block that it took the place of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    D: int
    spec: MoESpec
    origin: Origin

    @classmethod
    def of(cls, moe: MoE) -> Block:
        """What is written of a converted block."""
        assert moe.origin is not None
        return cls(D=moe.D, spec=moe.spec, origin=moe.origin)


class Manifest(BaseModel):
    """moepass.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    moepass_version: str
    blocks: tuple[Block, ...]


def is_own(folder: Path) -> bool:
    """Whether the folder claims to be in this format."""
    return (folder / MANIFEST).is_file()


def small(dense_config: dict[str, Any], blocks: list[Block]) -> dict[str, bytes]:
    """config.json and moepass.json."""
    manifest = Manifest(moepass_version=moepass.__version__, blocks=tuple(blocks))
    config = {"architectures": ["MoepassForCausalLM"], "dense_config": dense_config, "model_type": NAME}
    return {
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        MANIFEST: (manifest.model_dump_json(indent=1) + "\n").encode(),
    }


def read(folder: Path) -> tuple[dict[str, Any], Manifest]:
    """The dense config and the manifest.  Raises ``BadMoEFolder``."""
    if not folder.is_dir():
        refuse(folder, "there is no such folder", _GIVE)
    manifest = _manifest(folder / MANIFEST)
    path = folder / "config.json"
    dense = _json(path).get("dense_config")
    if not isinstance(dense, dict) or not isinstance(dense.get("model_type"), str):
        refuse(path, "it has no dense_config with a model_type", "restore the file as it was written")
    return dense, manifest


def _manifest(path: Path) -> Manifest:
    content = _json(path)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        detail = f"schema_version={version!r}, and this moepass reads {SCHEMA_VERSION}"
        refuse(path, detail, "install a newer moepass" if newer else "restore the file as it was written")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        refuse(path, f"{place}: {first['msg']} (got {first['input']!r:.80})", "restore the file as it was written")
    except errors.SpecError as error:
        refuse(path, str(error), "restore the file as it was written")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        refuse(path, "there is no such file", _GIVE)
    except OSError as error:
        refuse(path, f"{error.strerror}", "check that the file is readable")
    except (ValueError, RecursionError) as error:
        refuse(path, f"it is not JSON ({error})", "restore the file as it was written")
    if not isinstance(content, dict):
        refuse(path, "it is not a JSON object", "restore the file as it was written")
    return content


def refuse(path: Path, detail: str, remedy: str) -> NoReturn:
    """Raise ``BadMoEFolder``."""
    raise errors.BadMoEFolder(path=path, detail=detail, remedy=remedy)
