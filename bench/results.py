"""Write and read the JSON files of benchmarks. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.files import write_atomic

ORIGIN = ("source", "device", "torch", "triton")  # see bench.timing.facts


def write_rows(path: Path | None, environment: dict[str, Any], rows: list[Any]) -> None:
    """Write the rows and their environment as JSON. Do nothing without a path."""
    if path:
        write_result(path, {"environment": environment, "rows": rows})


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(result, indent=2) + "\n")


def read_result(
    path: Path | None, environment: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return the content of a result.

    Return None if there is no file, or if `environment` is given and the result is from other
    sources, another device or other versions of torch and Triton.
    """
    if path is None or not path.exists():
        return None
    result = json.loads(path.read_text())
    if environment is None:
        return result
    origins = ([facts.get(key) for key in ORIGIN] for facts in (result["environment"], environment))
    return result if len({tuple(origin) for origin in origins}) == 1 else None


def earlier_rows(path: Path | None, environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that the same sources measured on such a machine, without failed ones."""
    result = read_result(path, environment)
    return [] if result is None else [row for row in result["rows"] if "exception" not in row]
