"""Read JSON files and check them against a pydantic model before anything uses their content."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from data.shards import DataError

MAX_PROBLEMS = 5  # that one message lists


class Schema(BaseModel):
    """A JSON object whose keys all have to be known, with values of exactly these types.

    4 is an integer; "4", 4.0 and true are not. NaN and infinity are not numbers.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class OpenSchema(Schema):
    """A `Schema` that ignores keys it does not know, for files that other programs write."""

    model_config = ConfigDict(extra="ignore")


S = TypeVar("S", bound=BaseModel)


def read_json(path: Path, schema: type[S], error: type[Exception] = DataError) -> S:
    """Read a JSON file that has to fit `schema`.

    Raises:
        error: the file cannot be read, is not JSON or does not fit. The message names the file and
            every key at fault.
    """
    return read_checked_json(path, schema, error)[0]


def read_checked_json(
    path: Path, schema: type[S], error: type[Exception] = DataError
) -> tuple[S, Any]:
    """Do what `read_json` does; return also the JSON itself, with keys that `schema` lacks."""
    try:
        content = Path(path).read_bytes()
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror})") from None
    return checked_json(content, str(path), schema, error)


def parse_json(
    content: str | bytes, where: str, schema: type[S], error: type[Exception] = DataError
) -> S:
    """Parse JSON that has to fit `schema`; `where` names its source in the message.

    Raises:
        error: the content is not JSON, is nested too deeply, repeats a key or does not fit.
    """
    return checked_json(content, where, schema, error)[0]


def checked_json(
    content: str | bytes, where: str, schema: type[S], error: type[Exception] = DataError
) -> tuple[S, Any]:
    """Do what `parse_json` does; return also the JSON itself, with keys that `schema` lacks."""
    try:
        return (
            schema.model_validate_json(content),
            json.loads(content, object_pairs_hook=_with_unique_keys),
        )
    except ValidationError as problem:
        raise error(f"{where}: {listed(problem)}") from None
    except ValueError as problem:
        raise error(f"{where}: {problem}") from None


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raise ValueError if an object has a key twice, of which pydantic takes the last."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {repeated!r:.60} is there twice")
    return dict(pairs)


def read_json_lines(
    path: Path,
    schema: type[S],
    error: type[Exception] = DataError,
    *,
    may_be_cut: bool = False,
) -> Iterator[tuple[int, S]]:
    """Yield the number, from 1, and the content of each line that is not empty.

    If it `may_be_cut`, a last line without an end is skipped.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and (line.endswith(b"\n") or not may_be_cut):
                    yield number, parse_json(line, f"{path}, line {number}", schema, error)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror})") from None


def listed(error: ValidationError, *, with_values: bool = True) -> str:
    """Return the problems in one line, each with its key and, if wanted, the value found."""
    problems = []
    for each in error.errors(include_url=False, include_context=False, include_input=with_values):
        key = ".".join(map(str, each["loc"]))
        is_known = not with_values or each["type"] in ("missing", "json_invalid")
        is_whole = each["type"] == "value_error" and isinstance(each.get("input"), dict)
        found = "" if is_known or is_whole else f" (found {each['input']!r:.60})"
        problems.append(f"{key}: {each['msg']}{found}" if key else f"{each['msg']}{found}")
    more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    return "; ".join(problems[:MAX_PROBLEMS]) + more
