"""Keep the rows of a study in a JSON file, to which further commands add."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from filelock import FileLock

from data.files import write_atomic
from studies.pool import iterate_in_pool
from studies.sweep.optimizers import default_settings

Key = TypeVar("Key")
Value = TypeVar("Value")
Row = dict[str, Any]


class Results(ABC, Generic[Key, Value]):
    """The results of finished runs in a JSON file. A run that the file contains is not repeated.

    A subclass makes runs, and converts a run and its result to an entry of the file and back.
    """

    list_name: ClassVar[str]  # of the entries in the file
    optimizers: ClassVar[tuple[str, ...]]  # whose default settings the runs have

    def __init__(self, path: Path, protocol: dict[str, Any]) -> None:
        """Raises ValueError if the file contains results of another protocol."""
        self.path, self.protocol = path, json.loads(json.dumps(protocol))
        defaults = {name: default_settings(name, True) for name in self.optimizers}
        self.defaults = self._defaults_of_file = json.loads(json.dumps(defaults))
        self.found: dict[Key, Value] = self._load()

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
        """Return the result of a run, which is made if the file lacks it.

        Raises ValueError if it is to be made, but the file is of a release with other defaults.
        """
        if run not in self.found:
            self._check_defaults()
            self.found[run] = self.make(run)
            with _locked(self.path):
                self.found = self._load() | self.found
                self._check_defaults()
                entries = ",\n".join(json.dumps(self.encode(*each)) for each in self.found.items())
                header = json.dumps({"protocol": self.protocol, "defaults": self.defaults})
                text = f'{header[:-1]},\n"{self.list_name}": [\n{entries}\n]}}\n'
                write_atomic(self.path, text)
        return self.found[run]

    def _load(self) -> dict[Key, Value]:
        """Return the results in the file, and note the defaults of their optimizers."""
        if not self.path.exists():
            return {}
        content = json.loads(self.path.read_text())
        if content.get("protocol") != self.protocol:
            raise ValueError(f"{self.path} holds results of another protocol; use another --out")
        self._defaults_of_file = content.get("defaults")
        return dict(map(self.decode, content[self.list_name]))

    def _check_defaults(self) -> None:
        if self._defaults_of_file != self.defaults:
            found = "other" if self._defaults_of_file else "unknown"
            raise ValueError(
                f"{self.path} holds runs of a release with {found} default settings of the "
                "optimizers; use another --out for new runs"
            )


def _locked(path: Path) -> FileLock:
    """Return a lock for the file, which other commands may write at the same time."""
    return FileLock(path.with_suffix(".lock"), mode=0o644)


def load_rows(path: Path, key_of: Callable[[Row], Key]) -> dict[Key, Row]:
    """Return {key: row} of the rows that earlier commands wrote to a file; {} without one.

    Raises ValueError if the file is not one of rows that have these keys.
    """
    return _load(path, key_of)[1]


def _load(path: Path, key_of: Callable[[Row], Key]) -> tuple[Row, dict[Key, Row]]:
    """Return the header of a file, and {key: row}."""
    if not path.exists():
        return {}, {}
    try:
        header = json.loads(path.read_text())
        return header, {key_of(row): row for row in header.pop("rows")}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold the rows of this study; use another file"
        ) from error


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

    Commands that run at the same time may share the file.

    Args:
        path: the file. Its rows with other keys are not changed.
        measure: called in a pool of processes.
        header: what the file holds beside the rows: the settings that all of them share.
    Returns:
        All rows of the file.
    Raises:
        ValueError: the file holds something else, or rows of another header.
    """
    if keys:
        check_header(path, key_of, header)
    for row in iterate_in_pool(measure, keys, workers):
        write_rows(path, [row], key_of, header)
    return [*load_rows(path, key_of).values()]


def write_rows(
    path: Path, new: Sequence[Row], key_of: Callable[[Row], Key], header: dict[str, Any]
) -> None:
    """Add rows to a file, or replace those with the same keys. Raises what `add_rows` raises."""
    with _locked(path):
        rows = check_header(path, key_of, header) | {key_of(row): row for row in new}
        write_atomic(path, json.dumps(header | {"rows": [*rows.values()]}) + "\n")


def check_header(
    path: Path, key_of: Callable[[Row], Key], header: dict[str, Any]
) -> dict[Key, Row]:
    """Return {key: row} of a file.

    Raises ValueError if it has another header. A dict in the header may have gained entries.
    """
    found, rows = _load(path, key_of)
    wanted = json.loads(json.dumps(header))
    changed = [
        key
        for key in sorted(found.keys() | wanted.keys())
        if not _is_part(found.get(key), wanted.get(key))
    ]
    if rows and changed:
        raise ValueError(f"{path} holds rows of another {', '.join(changed)}; use another --out")
    return rows


def _is_part(found: Any, wanted: Any) -> bool:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.items() <= wanted.items()
    return found == wanted
