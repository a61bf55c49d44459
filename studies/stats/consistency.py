"""Check that records may share a leaderboard: one run per optimizer and seed, equal conditions."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from studies.stats.records import (
    AnalysisError,
    Record,
    by_variant,
    grouped,
    is_control,
    is_reported,
)
from studies.sweep.variants import MODEL_SETTINGS
from trainer.settings import FIELDS

Key = tuple[Any, ...]


def model_of(record: Record) -> str | None:
    """Describe the model settings that differ from the defaults, or return None.

    Returns None for single runs, whose models may differ, and if train.py did not make the model.
    A setting that the record lacks, because train.py did not have it yet, has its default.
    """
    settings = record.get("settings", {}) if record["role"] != "single" else {}
    known = sorted(settings.keys() & MODEL_SETTINGS)
    changed = [f"{key}={settings[key]}" for key in known if settings[key] != FIELDS[key].default]
    return (", ".join(changed) or "by default") if known else None


def _from_grading(key: str) -> Callable[[Record], Any]:
    return lambda record: (record.get("grading") or {}).get(key)  # older records may lack it


CONDITIONS: dict[str, Callable[[Record], Any]] = {  # equal for all runs of a leaderboard
    "tokens of training": lambda record: record["tokens"],
    "models": model_of,
    "graded episodes": _from_grading("n"),
    "seeds of the episodes": _from_grading("seed"),
    "versions of the grading code": _from_grading("code"),
}


def knobs_of(spec: str) -> str:
    """Return the specification of a task without the instance, which a seed draws."""
    return re.sub(r"\binstance=\d+,?", "", spec).rstrip(",")


def check(records: Iterable[Record]) -> None:
    """Raise AnalysisError if reported records must not be pooled or compared.

    On a leaderboard (same task, knobs and training length) each optimizer has one run per seed and
    one learning rate, and all runs have the same model, number of training tokens, episodes and
    version of the grading code. Single runs are told apart by their folders, and their models may
    differ. Controls are checked too, except for their learning rates; references are not.
    """
    compared = [record for record in records if is_reported(record) or is_control(record)]
    for board in grouped(compared, _board_key).values():
        _check_repeated(board)
        _check_rates([record for record in board if record["role"] == "fresh"])
        _check_conditions(board)


def _board_key(record: Record) -> Key:
    """Return a key that is the same for all records of a leaderboard."""
    is_single = record["role"] == "single"
    return is_single, record["task"], record["steps"], knobs_of(record["spec"])


def _check_repeated(board: list[Record]) -> None:
    def run_key(record: Record) -> Key:
        folder = record["settings"]["out_dir"] if record["role"] == "single" else ""
        rate = record["lr"] if is_control(record) else 0
        return record["variant"], record["seed"], folder, rate

    for (variant, seed, *_), runs in grouped(board, run_key).items():
        if len(runs) > 1:
            raise AnalysisError(
                f"{_name(board)}, {variant}, seed {seed}: {len(runs)} reported records, lr "
                f"{_listed(record['lr'] for record in runs)}; expected one: give each folder "
                "once, or delete the stale lines from records.jsonl"
            )


def _check_rates(board: list[Record]) -> None:
    for variant, runs in by_variant(board).items():
        if len({record["lr"] for record in runs}) > 1:
            raise AnalysisError(
                f"{_name(board)}, {variant}: fresh runs at more than one learning rate, "
                f"{_listed(record['lr'] for record in runs)}; delete from records.jsonl those "
                "whose rate is not the best of the sweep"
            )


def _check_conditions(board: list[Record]) -> None:
    for name, value in CONDITIONS.items():
        known = [record for record in board if value(record) is not None]
        found = {each: _variants(runs) for each, runs in grouped(known, value).items()}
        if len(found) > 1:
            differing = "; ".join(f"{each} ({names})" for each, names in sorted(found.items()))
            raise AnalysisError(
                f"{_name(board)}: runs with different {name} cannot share a leaderboard: "
                f"{differing}; report them separately, or run them again under equal conditions"
            )


def _name(board: list[Record]) -> str:
    return f"{knobs_of(board[0]['spec'])}, {board[0]['steps']} steps"


def _variants(runs: list[Record]) -> str:
    return ", ".join(dict.fromkeys(record["variant"] for record in runs))


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted({*rates}))
