"""What a report shows below the leaderboard: other metrics, samples, and what to repeat it with."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from studies.report.format import NONE, Cell, error_unit, metric_label, number, pair, times
from studies.report.leaderboard import estimate_of
from studies.report.sections import Section, finished_runs
from studies.stats.analysis import Record, is_finished, is_reported, primary, references, val_loss
from studies.stats.consistency import knobs_of
from studies.stats.matched import matched_validation, placebo, quantity
from studies.stats.seeds import over_seeds
from studies.stats.temperatures import ranked

QUARTERS = (0, 0.25, 0.5, 0.75, 1)  # of the horizon: where episodes are counted
N_SAMPLES = 2  # of each optimizer
MEANING = {  # of references, studies/sweep/reference.py
    "oracle": "the source itself",
    "greedy": "its likeliest token",
    "uniform": "every token equally likely",
    "zero": "the policy that never acts",
}


@dataclass(frozen=True)
class Table:
    """A line of cells for each name."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


def metrics_table(section: Section) -> Table:
    """All metrics of all variants that finished, in the order of the leaderboard."""
    runs = finished_runs(section)
    grades = [record["grade"]["metrics"] for own in runs.values() for record in own]
    names = list(dict.fromkeys(name for metrics in grades for name in metrics))
    rows = [(variant, [_cell(own, name) for name in names]) for variant, own in runs.items()]
    return Table([metric_label(name, error_unit(names)) for name in names], rows)


def _cell(runs: list[Record], name: str) -> Cell:
    """Over seeds, or a single run's own interval; says so if some runs have no such number."""
    metrics = [record["grade"]["metrics"] for record in runs]
    values = [estimate_of(each[name]) for each in metrics if name in each]
    known = [each for each in values if math.isfinite(each.mean)]
    if not known:
        return NONE, ""
    mean, half = pair(known[0] if len(runs) == 1 else over_seeds([each.mean for each in known]))
    return mean, half if len(known) == len(runs) else f"{half} ({len(known)} of {len(runs)} runs)"


def matched_table(section: Section) -> Table | None:
    """Rollout error, or its odds, at equal error on the data, over the base's; and the seeds."""
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
    """Each optimizer at its own temperature. records: of temperature.jsonl; None without any."""
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
    """The same of pairs of base optimizers, which nothing was done to."""
    found = placebo(section.records)
    rows = [(name, [times(each), (str(each.n), "")]) for name, each in found.items()]
    what = quantity(section.records[0])
    return Table([f"first’s {what}, times the second’s", "seeds"], rows) if rows else None


def reference_rows(section: Section) -> list[tuple[str, Cell, Cell]]:
    """(name, primary metric, validation loss) of what no optimizer made."""
    found = references(section.references).items()
    return [
        (f"{name}, {MEANING[name]}", pair(metric), pair(loss)) for name, (loss, metric) in found
    ]


def episodes_left(section: Section) -> Table | None:
    """Mean number of episodes under way at some steps; None if none ever ends."""
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


@dataclass(frozen=True)
class Sampled:
    """The first episodes of one run."""

    variant: str
    seed: int
    texts: list[dict[str, str]]  # "data" and "own", perhaps "prompt"


def samples(section: Section) -> list[Sampled]:
    """Of the best variant, the best other one of its base, and the last; the first seed of each."""
    runs = finished_runs(section)
    board = [entry for entry in section.entries if entry.variant in runs]
    family = [entry for entry in board if entry.base == board[0].base]
    names = dict.fromkeys(entry.variant for entry in [*board[:1], *family[1:2], *board[-1:]])
    first = [min(runs[name], key=lambda record: record["seed"]) for name in names]
    found = [Sampled(r["variant"], r["seed"], r["grade"]["samples"][:N_SAMPLES]) for r in first]
    return [each for each in found if each.texts]


def incidents(section: Section, protocols: Iterable[dict[str, Any]]) -> list[str]:
    """Reported runs that diverged, and those that were planned but are not there."""
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
    """Learning rates at which tuning runs diverged, "sgd 0.1, 0.2", a line a variant."""
    rates: dict[str, set[float]] = defaultdict(set)
    for record in section.records:
        if record["role"] == "tuning" and not is_finished(record):
            rates[record["variant"]].add(record["lr"])
    return [f"{v} {', '.join(f'{lr:g}' for lr in sorted(own))}" for v, own in rates.items()]


def fingerprints(section: Section) -> list[tuple[int, str, int]]:
    """(seed, SHA-256, variants) of the data's own episodes among the samples.

    They do not depend on the model: a seed that has two was not graded on the same episodes.
    """
    seen: dict[tuple[int, str], set[str]] = defaultdict(set)
    for variant, own in finished_runs(section).items():
        for record in own:
            if texts := [sample["data"] for sample in record["grade"]["samples"]]:
                digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
                seen[record["seed"], digest].add(variant)
    return [(seed, digest, len(variants)) for (seed, digest), variants in sorted(seen.items())]


def distinct(values: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    """Each different object as "key value" text, with how often it occurs."""
    counts: dict[str, int] = defaultdict(int)
    for value in values:
        counts[", ".join(f"{key} {each}" for key, each in value.items())] += 1
    return sorted(counts.items(), key=lambda item: -item[1])


def grading(section: Section) -> list[tuple[str, int]]:
    """Number and seed of the episodes of each run."""
    keys = {"n": "episodes", "seed": "seed"}
    each = [r["grading"] for r in section.records if r.get("grading")]
    return distinct({text: how[key] for key, text in keys.items()} for how in each)


def all_runs(records: Sequence[Record]) -> list[list[str]]:
    """A line for every run, tuning and diverged ones too."""
    lines = []
    for r in sorted(
        records, key=lambda r: (r["base"], r["variant"], r["role"], r["lr"], r["seed"])
    ):
        values = number(val_loss(r)), number(primary(r))
        lines.append([r["variant"], r["role"], f"{r['lr']:g}", str(r["seed"]), *values])
        lines[-1] += [number(r["seconds"], 1), r["command"]]
    return lines
