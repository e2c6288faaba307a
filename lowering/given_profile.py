"""Profiles that a user names: a JSON file of a machine, or of a link, and one clear error where it is neither."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from moepass import errors

Profile = TypeVar("Profile", bound=BaseModel)


def read(kind: type[Profile], path: Path) -> Profile:
    """The profile in a file.  Raises ``BadProfile``."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise errors.BadProfile(path=path, detail=error.strerror or str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise errors.BadProfile(path=path, detail=f"{where}: {first['msg']}" if where else first["msg"]) from error
