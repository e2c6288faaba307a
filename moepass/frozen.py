"""What the values that planning and reports pass around are made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A value: hashable, equal by its fields, read from JSON with no field unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")
