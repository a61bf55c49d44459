"""May these records share a leaderboard? One run an optimizer and seed, all with the same means."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from studies.stats.analysis import (
    AnalysisError,
    Record,
    by_variant,
    grouped,
    is_control,
    is_reported,
)
from studies.sweep.variants import OF_THE_MODEL
from trainer.settings import FIELDS

Key = tuple[Any, ...]


def model_of(record: Record) -> str | None:
    """What the model has otherwise than by default; None for single runs, whose models may differ,
    and where train.py made none. A setting that train.py had not then has its default."""
    settings = record.get("settings", {}) if record["role"] != "single" else {}
    known = sorted(settings.keys() & OF_THE_MODEL)
    changed = [f"{key}={settings[key]}" for key in known if settings[key] != FIELDS[key].default]
    return (", ".join(changed) or "by default") if known else None


def _of_the_grading(key: str) -> Callable[[Record], Any]:
    return lambda record: (record.get("grading") or {}).get(key)  # none on lds


MEANS: dict[str, Callable[[Record], Any]] = {  # what is the same for all that are compared
    "tokens of training": lambda record: record["tokens"],
    "models": model_of,
    "graded episodes": _of_the_grading("n"),
    "seeds of the episodes": _of_the_grading("seed"),
    "versions of the grading code": _of_the_grading("code"),
}


def knobs_of(spec: str) -> str:
    """The specification of a task without the instance, which a seed draws."""
    return re.sub(r"\binstance=\d+,?", "", spec).rstrip(",")


def check(records: Iterable[Record]) -> None:
    """AnalysisError for reported records that must not be pooled or compared, by name.

    A run of the same task, knobs, length, optimizer and seed may be there once; an optimizer has
    one learning rate; all that stand on one leaderboard have the same model, saw as many tokens,
    and were graded on the same episodes by the same code. Single runs are told apart by their
    folders, and their models may differ. References are exempt, controls are not.
    """
    compared = [record for record in records if is_reported(record) or is_control(record)]
    for board in grouped(compared, _board).values():
        _check_repeated(board)
        _check_rates([record for record in board if record["role"] == "fresh"])
        _check_means(board)


def _board(record: Record) -> Key:
    """Records with the same key stand on the same leaderboard."""
    is_single = record["role"] == "single"
    return is_single, record["task"], record["steps"], knobs_of(record["spec"])


def _check_repeated(board: list[Record]) -> None:
    def run(record: Record) -> Key:
        folder = record["settings"]["out_dir"] if record["role"] == "single" else ""
        rate = record["lr"] if is_control(record) else 0
        return record["variant"], record["seed"], folder, rate

    for (variant, seed, *_), runs in grouped(board, run).items():
        if len(runs) > 1:
            raise AnalysisError(
                f"{_name(board)}, {variant}, seed {seed}: {len(runs)} reported records, lr "
                f"{_listed(record['lr'] for record in runs)}; one is wanted: give each folder "
                "once, or delete the stale lines from records.jsonl"
            )


def _check_rates(board: list[Record]) -> None:
    for variant, runs in by_variant(board).items():
        if len({record["lr"] for record in runs}) > 1:
            raise AnalysisError(
                f"{_name(board)}, {variant}: fresh runs at more than one learning rate, "
                f"{_listed(record['lr'] for record in runs)}; delete those of the rate that is "
                "not the sweep's best from records.jsonl"
            )


def _check_means(board: list[Record]) -> None:
    for what, value in MEANS.items():
        known = [record for record in board if value(record) is not None]
        found = {each: _names(runs) for each, runs in grouped(known, value).items()}
        if len(found) > 1:
            differing = "; ".join(f"{each} ({names})" for each, names in sorted(found.items()))
            raise AnalysisError(
                f"{_name(board)}: runs of different {what} do not share a leaderboard: "
                f"{differing}; report them apart, or run them again alike"
            )


def _name(board: list[Record]) -> str:
    return f"{knobs_of(board[0]['spec'])}, {board[0]['steps']} steps"


def _names(runs: list[Record]) -> str:
    return ", ".join(dict.fromkeys(record["variant"] for record in runs))


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in sorted({*rates}))
