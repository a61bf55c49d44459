"""Repeat a run of a submission bit for bit, and run its optimizers on seeds that it cannot know."""

import hashlib
from dataclasses import replace
from pathlib import Path

from studies.stats.records import Record, is_finished
from studies.sweep.run_cache import TrialError
from studies.sweep.study import Study
from studies.sweep.trial import Trial, run_folder, run_trial

HIDDEN = "hidden.jsonl"  # the records of the hidden seeds, beside RECORDS
N_HIDDEN = 5  # seeds


def number_of(*words: object) -> int:
    """Return a whole number below 2**32 that is a function of the words."""
    text = " ".join(map(str, words))
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def hidden_seeds(revision: str, task: str) -> list[int]:
    """Return the seeds of a submission. Another revision of the code has other seeds."""
    return [number_of(revision, task, i) for i in range(N_HIDDEN)]


def chosen_run(records: list[Record], revision: str) -> Record:
    """Return the finished fresh run that is repeated, which the revision selects."""
    fresh = [each for each in records if each["role"] == "fresh" and is_finished(each)]
    fresh.sort(key=lambda record: (record["variant"], record["seed"]))
    if not fresh:
        raise ValueError("no fresh run finished, so none can be repeated")
    return fresh[number_of(revision, "repeat") % len(fresh)]


def repeat(study: Study, record: Record, folder: Path) -> None:
    """Train and grade the model of a record again, in `folder`.

    Raises TrialError if the validation loss or a metric has other bits.
    """
    variant = next(each for each in study.variants if each.name == record["variant"])
    trial = study.trial(variant, record["role"], record["lr"], record["seed"])
    found = run_trial(replace(trial, folder=folder))
    means = [
        {"val loss": each["val_loss"]}
        | {key: metric["mean"] for key, metric in each["grade"]["metrics"].items()}
        for each in (record, found)
    ]
    changed = {
        key: f"{means[0][key]!r} was submitted, {means[1].get(key)!r} is found"
        for key in means[0]
        if means[0][key] != means[1].get(key)
    }
    if changed:
        theirs, ours = record["environment"], found["environment"]
        other = [
            f"{key}: {theirs[key]} and {ours.get(key)}"
            for key in theirs
            if theirs[key] != ours.get(key)
        ]
        hint = f"; the environments differ ({'; '.join(other)})" if other else ""
        details = "; ".join(f"{key}: {change}" for key, change in changed.items())
        raise TrialError(
            f"{record['variant']}, seed {record['seed']}, cannot be repeated bit for bit{hint}: "
            f"{details}"
        )


def hidden_trials(study: Study, records: list[Record], revision: str, out: Path) -> list[Trial]:
    """Return the runs of every optimizer, at its rate, on the hidden seeds."""
    rates = {record["variant"]: record["lr"] for record in records if record["role"] == "fresh"}
    return [
        replace(
            study.trial(variant, "fresh", rates[variant.name], seed),
            folder=run_folder(out, variant.name, rates[variant.name], seed),
        )
        for variant in study.variants
        for seed in hidden_seeds(revision, study.task.name)
    ]
