"""Measure on, although one measurement failed: a GPU may not be at hand again soon."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Row = dict[str, Any]


def missing(
    makers: Mapping[str, Callable[..., Iterable[Any]]],
    sizes: Mapping[str, Iterable[Any]],
    operations: Iterable[str],
    rows: Iterable[Row],
) -> Iterator[Any]:
    """Yield the cases of these operations, at all their sizes, that have no row yet.

    Args:
        makers: for each operation, the function that returns the cases of a size.
    """
    done = {row["case"] for row in rows}
    for operation in operations:
        for size in sizes[operation]:
            yield from (case for case in makers[operation](*size) if case.name not in done)


def attempt(measure: Callable[[], Row]) -> Row:
    """Return the row of a measurement, or its exception as text in a row of its own."""
    try:
        return measure()
    except Exception as problem:
        traceback.print_exc()
        return {"exception": f"{type(problem).__name__}: {problem}"}
