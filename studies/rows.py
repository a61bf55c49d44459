"""Keep the rows of a study in a JSON file, to which further commands add."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from data.files import write_atomic
from studies.pool import iterate_in_pool

Key = TypeVar("Key")
Value = TypeVar("Value")
Row = dict[str, Any]


class Results(ABC, Generic[Key, Value]):
    """The results of finished runs in a JSON file. A run that the file contains is not repeated.

    A subclass makes runs, and converts a run and its result to an entry of the file and back.
    """

    list_name: ClassVar[str]  # of the entries in the file

    def __init__(self, path: Path, protocol: dict[str, Any]) -> None:
        """Raises ValueError if the file contains results of another protocol."""
        self.path, self.protocol = path, json.loads(json.dumps(protocol))
        self.found: dict[Key, Value] = {}
        if path.exists():
            content = json.loads(path.read_text())
            if content.get("protocol") != self.protocol:
                raise ValueError(f"{path} holds results of another protocol; use another --out")
            self.found = dict(map(self.decode, content[self.list_name]))

    @abstractmethod
    def make(self, run: Key) -> Value:
        """Train the model of a run, and grade it."""

    @abstractmethod
    def encode(self, run: Key, value: Value) -> Any:
        """Convert a run and its result to an entry of the file."""

    @abstractmethod
    def decode(self, entry: Any) -> tuple[Key, Value]:
        """Convert an entry of the file to a run and its result."""

    def of(self, run: Key) -> Value:
        """Return the result of a run, which is made if the file lacks it."""
        if run not in self.found:
            self.found[run] = self.make(run)
            entries = ",\n".join(json.dumps(self.encode(*each)) for each in self.found.items())
            protocol = json.dumps(self.protocol)
            text = f'{{"protocol": {protocol},\n"{self.list_name}": [\n{entries}\n]}}\n'
            write_atomic(self.path, text)
        return self.found[run]


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
