"""Make the tables and lists below a leaderboard: other metrics, samples, incidents, all runs."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from studies.report.format import NONE, Cell, error_unit, metric_label, number, pair, times
from studies.report.leaderboard import estimate_of
from studies.report.sections import Section, finished_runs
from studies.stats.analysis import references
from studies.stats.consistency import knobs_of
from studies.stats.errors import primary
from studies.stats.matched import matched_validation, placebo, quantity
from studies.stats.records import Record, is_finished, is_reported, val_loss
from studies.stats.seeds import over_seeds
from studies.stats.temperatures import ranked

QUARTERS = (0, 0.25, 0.5, 0.75, 1)  # fractions of the horizon at which episodes are counted
N_SAMPLES = 2  # shown of each optimizer
MEANING = {  # of the references in studies/sweep/reference.py
    "oracle": "the source itself",
    "greedy": "its likeliest token",
    "uniform": "every token equally likely",
    "zero": "the policy that never acts",
    "expert": "which was cloned",
}


@dataclass(frozen=True)
class Table:
    """A table with a row of cells for each name."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


def metrics_table(section: Section) -> Table:
    """Return all metrics of all variants that finished, in the order of the leaderboard."""
    runs = finished_runs(section)
    grades = [record["grade"]["metrics"] for own in runs.values() for record in own]
    names = list(dict.fromkeys(name for metrics in grades for name in metrics))
    rows = [(variant, [_cell(own, name) for name in names]) for variant, own in runs.items()]
    return Table([metric_label(name, error_unit(names)) for name in names], rows)


def _cell(runs: list[Record], name: str) -> Cell:
    """Format one metric over seeds, or with the interval over episodes of a single run.

    The cell says how many runs have the metric if not all have it.
    """
    metrics = [record["grade"]["metrics"] for record in runs]
    values = [estimate_of(each[name]) for each in metrics if name in each]
    known = [each for each in values if math.isfinite(each.mean)]
    if not known:
        return NONE, ""
    mean, half = pair(known[0] if len(runs) == 1 else over_seeds([each.mean for each in known]))
    return mean, half if len(known) == len(runs) else f"{half} ({len(known)} of {len(runs)} runs)"


def matched_table(section: Section) -> Table | None:
    """Return rollout errors (or odds) over the base's at equal error on the data, and the seeds.

    Returns None if there is no comparison.
    """
    found = matched_validation(section.records)
    rows = []
    for variant, own in finished_runs(section).items():
        if variant in found:
            residual = found[variant].residual
            rows.append((variant, [times(residual), (f"{residual.n} of {len(own)}", "")]))
    what = quantity(section.records[0])
    return (
        Table([f"{what} in rollouts, times the base’s", "seeds compared"], rows) if rows else None
    )


def temperature_table(records: list[Record]) -> Table | None:
    """Return each optimizer at its own temperature; None if `records` is empty."""
    if not records:
        return None
    rows = []
    for each in ranked(records):
        versus = (each.row.versus_base, each.all_else_equal)
        ratios = [times(found.difference) if found else (NONE, "") for found in versus]
        cells = (f"{each.temperature:g}", ""), pair(each.row.primary), *ratios
        rows.append((each.row.variant, [*cells]))
    columns = ["temperature", metric_label(records[0]["primary"])]
    return Table([*columns, "error / base’s", "error / base’s at this rate and temperature"], rows)


def placebo_table(section: Section) -> Table | None:
    """Return the same comparison for pairs of base optimizers; None if it is not possible."""
    found = placebo(section.records)
    rows = [(name, [times(each), (str(each.n), "")]) for name, each in found.items()]
    what = quantity(section.records[0])
    return Table([f"first’s {what}, times the second’s", "seeds"], rows) if rows else None


def reference_rows(section: Section) -> list[tuple[str, Cell, Cell]]:
    """Return (name, primary metric, validation loss) of each reference policy."""
    found = references(section.references).items()
    return [
        (f"{name}, {MEANING[name]}", pair(metric), pair(loss)) for name, (loss, metric) in found
    ]


def episodes_left(section: Section) -> Table | None:
    """Return the mean number of unfinished episodes at some steps; None if no episode ends."""
    runs = finished_runs(section)
    counts = {
        variant: np.mean([r["grade"]["n_t"]["own"] for r in own], axis=0)  # (H,)
        for variant, own in runs.items()
        if all(r["grade"]["n_t"].get("own") for r in own)
    }
    if all(np.ptp(each) == 0 for each in counts.values()):
        return None
    horizon = max(map(len, counts.values()))
    at = sorted({round(part * (horizon - 1)) for part in QUARTERS})
    rows = [(v, [(number(n[t], 0), "") for t in at]) for v, n in counts.items()]
    return Table([f"step {t + 1}" for t in at], rows)


def samples(section: Section) -> list[tuple[str, int, list[dict[str, str]]]]:
    """Return episodes of the best variant, of the next one with its base, and of the last one.

    Each entry has the variant, its first seed, and the texts "data", "own" and perhaps "prompt" of
    some episodes.
    """
    runs = finished_runs(section)
    board = [entry for entry in section.entries if entry.variant in runs]
    family = [entry for entry in board if entry.base == board[0].base]
    names = dict.fromkeys(entry.variant for entry in [*board[:1], *family[1:2], *board[-1:]])
    first = [min(runs[name], key=lambda record: record["seed"]) for name in names]
    found = [(r["variant"], r["seed"], r["grade"]["samples"][:N_SAMPLES]) for r in first]
    return [each for each in found if each[2]]


def incidents(section: Section, protocols: Iterable[dict[str, Any]]) -> list[str]:
    """List the reported runs that diverged, and the planned runs that are missing."""
    found = [
        f"{r['variant']}, lr {r['lr']:g}, seed {r['seed']} ({r['role']}): diverged"
        for r in section.records
        if is_reported(r) and not is_finished(r)
    ]
    present = {(r["variant"], r["seed"]) for r in section.records if is_reported(r)}
    for protocol in protocols if section.is_study else ():
        if (knobs_of(protocol["spec"]), protocol["steps"]) == (section.knobs, section.steps):
            planned = [(v, seed) for v in protocol["variants"] for seed in protocol["fresh_seeds"]]
            absent = [run for run in planned if run not in present]
            found += [f"{variant}, seed {seed} (fresh): missing" for variant, seed in absent]
    return found


def lost_rates(section: Section) -> list[str]:
    """List the learning rates at which tuning runs diverged: "sgd 0.1, 0.2" for each variant."""
    rates: dict[str, set[float]] = defaultdict(set)
    for record in section.records:
        if record["role"] == "tuning" and not is_finished(record):
            rates[record["variant"]].add(record["lr"])
    return [f"{v} {', '.join(f'{lr:g}' for lr in sorted(own))}" for v, own in rates.items()]


def fingerprints(section: Section) -> list[tuple[int, str, int]]:
    """Return (seed, SHA-256, number of variants) of the data's episodes among the samples.

    They do not depend on the model: two hashes of one seed mean that the runs were graded on
    different episodes.
    """
    seen: dict[tuple[int, str], set[str]] = defaultdict(set)
    for variant, own in finished_runs(section).items():
        for record in own:
            if texts := [sample["data"] for sample in record["grade"]["samples"]]:
                digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
                seen[record["seed"], digest].add(variant)
    return [(seed, digest, len(variants)) for (seed, digest), variants in sorted(seen.items())]


def distinct(values: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    """Return each distinct object as "key value" text with its number of occurrences."""
    counts: dict[str, int] = defaultdict(int)
    for value in values:
        counts[", ".join(f"{key} {each}" for key, each in value.items())] += 1
    return sorted(counts.items(), key=lambda item: -item[1])


def grading(section: Section) -> list[tuple[str, int]]:
    """Return the number and the seed of the graded episodes, with how many runs have them."""
    keys = {"n": "episodes", "seed": "seed"}
    each = [r["grading"] for r in section.records if r.get("grading")]
    return distinct({text: how[key] for key, text in keys.items()} for how in each)


def all_runs(records: Sequence[Record]) -> list[list[str]]:
    """Return a row for every run, including tuning runs and runs that diverged."""
    rows = []
    for r in sorted(records, key=itemgetter("base", "variant", "role", "lr", "seed")):
        values = f"{r['lr']:g}", str(r["seed"]), number(val_loss(r)), number(primary(r))
        rows.append([r["variant"], r["role"], *values, number(r["seconds"], 1), r["command"]])
    return rows
