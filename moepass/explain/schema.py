"""The JSON Schema of a plan report, shipped as ``report.schema.json``.

``python -m moepass.explain.schema`` writes the file anew after a change of the report's fields.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moepass.explain.files import write_atomic
from moepass.explain.report import SCHEMA_VERSION, PlanReport

PATH = Path(__file__).with_name("report.schema.json")


def schema() -> dict[str, Any]:
    """What `PlanReport.to_json` writes, the derived fields included (draft 2020-12)."""
    derived: dict[str, Any] = {
        "fingerprint": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
        "summary": {"type": "object", "additionalProperties": {"type": "integer"}},
    }
    model = PlanReport.model_json_schema(mode="serialization")
    model["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    model["title"] = f"moepass plan report {SCHEMA_VERSION}"
    model["properties"].update(derived)
    model["required"] = sorted({*model.get("required", ()), *derived})
    model["$defs"]["Price"]["properties"]["total"] = {"type": "number", "description": "seconds"}
    return model


if __name__ == "__main__":
    write_atomic(PATH, json.dumps(schema(), indent=2) + "\n")
