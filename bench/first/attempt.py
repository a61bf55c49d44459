"""Measure on, although one measurement failed: a GPU may not be at hand again soon."""

import traceback
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def attempt(measure: Callable[[], Row]) -> Row:
    """Return the row of a measurement, or its exception as text in a row of its own."""
    try:
        return measure()
    except Exception as problem:
        traceback.print_exc()
        return {"exception": f"{type(problem).__name__}: {problem}"}
