"""The rows of a study in a JSON file, to which further commands add."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data.files import write_atomic
from studies.pool import iterate_in_pool

Key = TypeVar("Key")
Row = dict[str, Any]


def load_rows(path: Path, key_of: Callable[[Row], Key]) -> dict[Key, Row]:
    """Return {key: row} of the rows that earlier commands wrote to a file; {} without one."""
    if not path.exists():
        return {}
    return {key_of(row): row for row in json.loads(path.read_text())["rows"]}


def add_rows(
    path: Path,
    measure: Callable[[Key], Row],
    keys: Sequence[Key],
    key_of: Callable[[Row], Key],
    *,
    workers: int,
    header: dict[str, Any],
) -> list[Row]:
    """Measure a row for every key, and write the file after each.

    Args:
        path: the file. Its rows with other keys are not changed.
        measure: called in a pool of processes.
        header: what the file holds beside the rows.
    Returns:
        All rows of the file.
    """
    rows = load_rows(path, key_of)
    for key, row in zip(keys, iterate_in_pool(measure, keys, workers), strict=True):
        rows[key] = row
        write_atomic(path, json.dumps(header | {"rows": [*rows.values()]}) + "\n")
    return [*rows.values()]
