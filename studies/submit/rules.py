"""Check a study's folder against the rules of the board (docs/leaderboard.md)."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

from studies.board.stages import STAGES
from studies.stats import consistency
from studies.stats.records import (
    RECORDS,
    AnalysisError,
    Record,
    StudyProtocol,
    grouped,
    read_object,
    read_records,
)
from studies.sweep.compare import parse, study_of
from studies.sweep.run_cache import differences
from studies.sweep.study import MAX_RATES, Study, best_rate, further_rate, mean_loss
from studies.sweep.variants import Variant

REPEAT = "repeat the study with python -m studies.sweep.compare as docs/leaderboard.md says"


def submitted_study(folder: Path) -> tuple[Study, list[Record]]:
    """Return the board's study of the optimizers in a folder, and the folder's records.

    Raises:
        AnalysisError: a file is missing or damaged, or its task is not on the board.
        ValueError: an optimizer cannot be used here.
    """
    records = read_records(folder / RECORDS)
    if not records:
        raise AnalysisError(f"{folder} contains no {RECORDS}; {REPEAT}")
    protocol = read_object(folder / "protocol.json", StudyProtocol, REPEAT)
    stages = {stage.task.split(",")[0]: stage for stage in STAGES}
    task = str(protocol.get("task"))
    if task not in stages:
        raise AnalysisError(f"{folder}: task {task!r} is not on the board: {', '.join(stages)}")
    stage = replace(stages[task], optimizers=tuple(protocol["variants"]))
    study = replace(study_of(parse(stage.argv(folder.parent, 1))[1]), out=folder)
    return study, records


def rule_problems(study: Study, records: list[Record], revision: str) -> list[str]:
    """List how a submission departs from the rules.

    Args:
        revision: the git revision of this checkout, which has to repeat the runs.
    """
    names = {variant.name for variant in study.variants}
    problems = _protocol_problems(study)
    problems += _stray_problems(study, records) or _pooling_problems(records)
    problems += _environment_problems(records, revision)
    for variant in study.variants:
        own = [record for record in records if record["variant"] == variant.name]
        problems += _sweep_problems(study, variant, own)
        problems += _seed_problems(study, variant, records)
        problems += _settings_problems(study, variant, own)
        if variant.base not in names:
            problems.append(f"{variant.name}: its base {variant.base} is missing")
    return problems


def _protocol_problems(study: Study) -> list[str]:
    found = read_object(study.out / "protocol.json", StudyProtocol, REPEAT)
    rules = json.loads(json.dumps(study.fixed()))
    return [
        f"protocol.json: {key} is {found.get(key)}, must be {wanted}"
        for key, wanted in rules.items()
        if found.get(key) != wanted
    ]


def _environment_problems(records: Iterable[Record], revision: str) -> list[str]:
    """Check that all runs have this revision of the code and one version of torch."""
    found = {str(record["environment"].get("git")) for record in records}
    problems = []
    if found != {revision}:
        problems.append(
            f"the runs are of revision {', '.join(sorted(found))}, but this is {revision}: check "
            "out theirs; it has to be one, committed without changes"
        )
    if revision.endswith("-dirty") or revision == "unknown":
        problems.append(f"revision {revision}: the code has to be committed without changes")
    versions = {str(record["environment"].get("torch")) for record in records}
    if len(versions) > 1:
        problems.append(f"the runs have several versions of torch: {', '.join(sorted(versions))}")
    return problems


def _pooling_problems(records: list[Record]) -> list[str]:
    """Say why records must not be compared, if they must not."""
    try:
        consistency.check(records)
    except AnalysisError as error:
        return [str(error)]
    return []


def _stray_problems(study: Study, records: list[Record]) -> list[str]:
    """Check that every record is of a role and a variant that the study has."""
    roles = {variant.name: {"tuning", "fresh", "control"} for variant in study.variants}
    roles |= {name: {"reference"} for name in study.task.references}
    strays = {
        f"{record['variant']} ({record['role']})"
        for record in records
        if record["role"] not in roles.get(record["variant"], ())
    }
    if not strays:
        return []
    return [f"records of runs that the study does not have: {', '.join(sorted(strays))}"]


def _sweep_problems(study: Study, variant: Variant, own: list[Record]) -> list[str]:
    """Check that the sweep has the prescribed rates and seeds, and its best rate was used."""
    tuning = [record for record in own if record["role"] == "tuning"]
    losses, where = {}, f"{variant.name}: the sweep"
    for lr, runs in grouped(tuning, itemgetter("lr")).items():
        if sorted(record["seed"] for record in runs) != [*range(study.tuning_seeds)]:
            return [f"{where} at lr {lr:g} needs the tuning seeds 0 to {study.tuning_seeds - 1}"]
        losses[lr] = mean_loss(runs)
    if not {*study.first_rates(variant)} <= losses.keys():
        first = ", ".join(f"{lr:g}" for lr in study.first_rates(variant))
        return [f"{where} has to begin with the rates {first}"]
    octaves = {lr: math.log2(lr / study.first_rates(variant)[0]) for lr in losses}
    if strays := [f"{lr:g}" for lr, k in octaves.items() if abs(k - round(k)) > 1e-6]:
        return [f"{where} has rates off its factor-2 grid ({', '.join(strays)})"]
    if len(losses) > MAX_RATES:
        return [f"{where} has {len(losses)} rates; {MAX_RATES} are allowed"]
    if beyond := further_rate(losses):
        return [f"{where} has its best rate at the edge; it has to try {beyond:g}"]
    used = {record["lr"] for record in own if record["role"] == "fresh"}
    if used - {best_rate(losses)}:
        return [f"{where} found lr {best_rate(losses):g}, but the fresh runs have {used}"]
    return []


def _seed_problems(study: Study, variant: Variant, records: list[Record]) -> list[str]:
    """Check that every fresh seed ran once, and the base once at the variant's rate."""
    own = [r for r in records if (r["variant"], r["role"]) == (variant.name, "fresh")]
    problems, wanted = [], [*study.seeds]
    if sorted(record["seed"] for record in own) != wanted:
        problems.append(f"{variant.name}: needs fresh runs on the seeds {wanted}, one of each")
    rates = {record["lr"] for record in own}
    base = [
        record["seed"]
        for record in records
        if record["variant"] == variant.base
        and record["lr"] in rates
        and record["role"] in ("fresh", "control")
    ]
    if variant.name != variant.base and sorted(base) != wanted:
        problems.append(f"{variant.base}: needs runs at the rate of {variant.name} on {wanted}")
    return problems


def _settings_problems(study: Study, variant: Variant, own: list[Record]) -> list[str]:
    """Check the settings, the task, the episodes and the grading code of every run."""
    problems = []
    for record in own:
        trial = study.trial(variant, record["role"], record["lr"], record["seed"])
        asked = json.loads(json.dumps(trial.asked()))
        changes = differences(record.get("asked", {}), asked)
        if changes:
            listed = "; ".join(f"{key} {change}" for key, change in changes.items())
            problems.append(
                f"{variant.name}, lr {record['lr']:g}, seed {record['seed']} departs from the "
                f"rules: {listed}"
            )
    return problems[:3]  # the others are alike
