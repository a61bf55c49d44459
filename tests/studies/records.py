"""Synthetic records for the tests of what reads them."""

from typing import Any


def record(variant: str, seed: int, value: float | None, **changes: Any) -> dict[str, Any]:
    """A graded run whose primary metric is `value`; None: it diverged."""
    estimate = {"mean": value, "lo": 0.0, "hi": 9.0, "n": 8}
    curve = {"mean": [1.0, value], "lo": [0.0, 0.0], "hi": [2.0, 9.0]}
    grade = {"metrics": {"accumulated_kl": estimate}, "curves": {"B": curve}, "n_t": {}}
    fields = {
        "task": "pdfa",
        "spec": "task:pdfa",
        "primary": "accumulated_kl",
        "higher_is_better": False,
        "variant": variant,
        "base": variant.removeprefix("fast-").removeprefix("dopr-"),
        "role": "fresh",
        "lr": 0.01,
        "seed": seed,
        "steps": 500,
        "tokens": 512000,
        "val_loss": None if value is None else 1.0,
        "grade": None if value is None else grade | {"samples": []},
    }
    return fields | changes
