"""Writing a file, or a folder of files, so that a reader sees all of it or none of it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` by rename, replacing an older file; makes missing parent folders.

    Raises OSError; nothing half written is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_folder(path: Path, files: Mapping[str, str]) -> None:
    """Make the folder ``path`` with ``files`` (relative path -> text) by one rename.

    Raises FileExistsError where there is a file, or a folder that is not empty, already; OSError otherwise.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        for name, text in files.items():
            file = draft / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
