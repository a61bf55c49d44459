"""Print the returns of a study of clones, each optimizer against its base.

    python -m studies.humanoid.tables studies/results/humanoid/optimizers

Differences are paired over seeds, with 95 % t-intervals; so are the ratios of returns and of
validation losses, which --base adds. Numbers are of the runs that did not diverge; the return says
how many did. The last column is the learning rate with the highest return on the tuning seeds,
where that differs from the one with the lowest validation loss.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from eval.command import command_parser, reported_errors
from eval.rollout.intervals import Estimate
from eval.tables import markdown
from studies.humanoid.task import Humanoid
from studies.report.format import times
from studies.rollout.results import plain
from studies.stats.errors import primary
from studies.stats.records import (
    AnalysisError,
    Record,
    by_variant,
    grouped,
    is_control,
    is_finished,
    is_reported,
    load_records,
    val_loss,
)
from studies.stats.seeds import over_seeds

HEADER = ("", "lr", "val loss", "return", "falls")
COMPARED = ("minus base", "minus base at this lr", "lr of the best return")


def with_half(found: Estimate, form: str) -> str:
    """Format a mean and half of its interval, if it has one; "" without values.

    form: of the mean; with "+", the mean has a sign.
    """
    if not found.n:
        return ""
    half = (found.hi - found.lo) / 2
    interval = "" if math.isnan(half) else f" ± {half:{form.lstrip('+')}}"
    return f"{found.mean:{form}}{interval}"


def mean_of(values: list[float], form: str) -> str:
    """Format the mean; "" without values."""
    return f"{np.mean(values):{form}}" if values else ""


def difference(
    own: list[Record], others: list[Record], value: Callable[[Record], float] = primary
) -> Estimate:
    """Return the mean difference of the returns, paired by seed, of runs that did not diverge.

    value: what is compared instead of the returns.
    """
    mine, theirs = (
        {record["seed"]: value(record) for record in runs if is_finished(record)}
        for runs in (own, others)
    )
    return over_seeds([mine[seed] - theirs[seed] for seed in mine if seed in theirs])


def at_rate(records: list[Record], variant: str, lr: float) -> list[Record]:
    """Return the runs of a variant at a rate on the fresh seeds."""
    return [
        record
        for record in records
        if record["variant"] == variant
        and record["lr"] == lr
        and (is_control(record) or is_reported(record))
    ]


def rate_of_rollouts(tuning: list[Record], chosen: float) -> str:
    """Return the rate with the highest mean return; "" if it is the chosen one."""
    returns = {
        lr: np.mean(list(map(primary, runs)))
        for lr, runs in grouped(tuning, lambda record: record["lr"]).items()
    }
    best = max(returns, key=lambda lr: np.nan_to_num(returns[lr], nan=-np.inf))
    return "" if best == chosen else f"{best:g}"


def records_of(folder: Path, first_seed: int = 0) -> list[Record]:
    """Return the tuning runs of a study of clones, and its other runs from a seed on."""
    records = load_records([folder])
    if others := {record["task"] for record in records} - {Humanoid.name}:
        raise AnalysisError(f"{folder} is a study of {', '.join(others)}, not of clones")
    kept = [each for each in records if each["role"] == "tuning" or each["seed"] >= first_seed]
    if not any(map(is_reported, kept)):
        raise AnalysisError(f"{folder} has no reported runs of the seeds from {first_seed} on")
    return kept


def table(
    folder: Path,
    reference: str | None = None,
    base_folder: Path | None = None,
    first_seed: int = 0,
) -> str:
    """Return the table of the study in a folder.

    Args:
        reference: the optimizer to compare with; None compares each one with its base.
        base_folder: of the study with the runs to compare with, if that is another one.
        first_seed: leaves out the reported runs of lower seeds.
    """
    records = records_of(folder, first_seed)
    compared = records_of(base_folder, first_seed) if base_folder else records
    fresh = by_variant(filter(is_reported, records))
    references = by_variant(filter(is_reported, compared))
    if reference not in (None, *references):
        raise AnalysisError(
            f"{base_folder or folder} has no runs of {reference}; there are {', '.join(references)}"
        )
    tuning = by_variant(record for record in records if record["role"] == "tuning")
    rows = []
    for name, runs in fresh.items():
        lr, base = runs[0]["lr"], reference or runs[0]["base"]
        own = [run for run in runs if is_finished(run)]
        lost = f" ({len(runs) - len(own)} of {len(runs)} diverged)" if len(own) < len(runs) else ""
        minus = [
            "" if name == base and not base_folder else with_half(difference(own, others), "+,.0f")
            for others in (references.get(base, []), at_rate(compared, base, lr))
        ]
        rows.append(
            (
                f"`{name}`",
                f"{lr:g}",
                mean_of(list(map(val_loss, own)), ".5f"),
                (with_half(over_seeds(list(map(primary, own))), ",.0f") + lost).strip(),
                mean_of([each["grade"]["metrics"]["falls"]["mean"] for each in own], ".2f"),
                *minus,
                rate_of_rollouts(tuning[name], lr) if name in tuning else "",
            )
        )
    return markdown((*HEADER, *COMPARED), rows)


def ratios(
    folder: Path, reference: str, base_folder: Path | None = None, first_seed: int = 0
) -> str:
    """Return a line for returns and one for losses: each optimizer's over that of `reference`.

    Means are geometric, over seeds. See `table` for the arguments.
    """
    fresh = by_variant(filter(is_reported, records_of(folder, first_seed)))
    references = fresh
    if base_folder:
        references = by_variant(filter(is_reported, records_of(base_folder, first_seed)))
    lines = []
    for name, log_value in (("return", log_return), ("val loss", log_loss)):
        found = [
            f"`{variant}` {plain(times(difference(own, references[reference], log_value)))}"
            for variant, own in fresh.items()
            if variant != reference or base_folder
        ]
        lines.append(f"{name} / that of `{reference}`: {', '.join(found)}")
    return "\n".join(lines)


def log_return(record: Record) -> float:
    return math.log(primary(record))


def log_loss(record: Record) -> float:
    return math.log(val_loss(record))


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = command_parser("studies.humanoid.tables", __doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--base", help="compare all others with this one, not with their bases")
    parser.add_argument("--base_folder", type=Path, help="the study that --base is in, if another")
    parser.add_argument("--first_seed", type=int, default=0, help="leave out runs of lower seeds")
    return parser, parser.parse_args(argv)


def main(argv: list[str]) -> None:
    parser, arguments = parse(argv)
    with reported_errors(parser):
        selected = arguments.base_folder, arguments.first_seed
        for folder in arguments.folders:
            print(f"{folder.name}\n\n{table(folder, arguments.base, *selected)}\n")
            if arguments.base:
                print(ratios(folder, arguments.base, *selected))


if __name__ == "__main__":
    main(sys.argv[1:])
