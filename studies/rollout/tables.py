"""Write the tables of the rollout study: a row per variant with DoPr, two columns per stage.

    python -m studies.rollout.tables [--out studies/results/rollout/tables.md]

Each cell is the rollout error as a multiple of the base's error: in the first column each optimizer
has its own learning rate, in the second (equal rates) the base has the variant's. Brackets hold 95
% intervals over seeds; * marks p below 0.05 / the number of comparisons in the family, if both
columns agree.
"""

import math
import sys
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path

from data.files import write_atomic
from eval.command import command_parser
from eval.tables import markdown
from studies.report.format import factor, times
from studies.report.sections import Section
from studies.report.summary_text import rank_agreement
from studies.rollout.ablations import changes_table
from studies.rollout.all_stages import ABLATIONS, STAGES, RolloutStage
from studies.rollout.results import GROUPS, RESULTS, grid, plain, sections_of, with_records
from studies.stats.analysis import leaderboard
from studies.stats.matched import matched_validation, placebo, quantity
from studies.stats.records import (
    AnalysisError,
    Record,
    by_variant,
    grouped,
    is_finished,
    load_records,
    val_loss,
)
from studies.stats.temperatures import load, ranked

EQUAL = "at equal rates"
ALIKE = "at equal rates and temperatures"
BASES_APART = "**two bases differ by up to**"
TAU = "**Kendall's tau of validation and rollouts**"


def group_table(heading: str, results: Path = RESULTS) -> str:
    """Return the table of the stages of a group that have records; "" if none has."""
    sections = sections_of(GROUPS[heading], results)
    return table(sections) if sections else ""


def table(sections: Sequence[Section]) -> str:
    """Return a table with two columns per section: each at its own rate, and equal rates."""
    header = [""]
    for section in sections:
        error = f"1 - {section.metric}" if section.higher_is_better else section.metric
        header += [f"{section.name}, {section.steps} steps: {error}", EQUAL]
    boards = [
        {
            entry.variant: (plain(v.error) + " *" * v.is_strict, plain(v.at_this_rate))
            for entry in section.entries
            if (v := entry.versus)
        }
        for section in sections
    ]
    return grid(header, boards, n_columns=2)


def against_table(base: str, results: Path = RESULTS) -> str:
    """Return a table of every optimizer against the same one, each at its own rate."""
    sections = sections_of([*GROUPS["500 steps"], *GROUPS["1,500 steps"]], results)
    header = ["", *(f"{each.name}, {each.steps} steps" for each in sections)]
    boards = []
    for section in sections:
        rows = leaderboard([record | {"base": base} for record in section.records])
        compared = {row.variant: row.versus_base for row in rows if row.versus_base}
        boards.append({name: (plain(times(d.difference)),) for name, d in compared.items()})
    return grid(header, boards, n_columns=1) if sections else ""


def equal_validation_table(results: Path = RESULTS) -> str:
    """Return rollout errors at equal validation over the base's, and how far two bases differ."""
    sections = sections_of([*GROUPS["500 steps"], *GROUPS["1,500 steps"]], results)
    header = [""]
    for each in sections:
        header += [f"{each.name}, {each.steps} steps: {quantity(each.records[0])}", "seeds"]
    return grid(header, [*map(_equal_validation, sections)], n_columns=2) if sections else ""


def _equal_validation(section: Section) -> dict[str, tuple[str, ...]]:
    """Return the cells of each variant, the difference of two bases, and the rank correlation."""
    cells = {
        name: (plain(times(found.residual)), f"{found.n_inside}/{found.n}")
        for name, found in matched_validation(section.records).items()
    }
    if apart := [abs(each.mean) for each in placebo(section.records).values()]:
        cells[BASES_APART] = factor(max(apart)), ""
    tau, n = rank_agreement(section.records) or (math.nan, 0)
    return cells if math.isnan(tau) else cells | {TAU: (f"{tau:.2f}", f"{n} optimizers")}


def temperature_table(stages: Sequence[RolloutStage], results: Path = RESULTS) -> str:
    """Return each optimizer at its own best temperature.

    Only stages that studies.sweep.temperature has graded are included.
    """
    folders = {stage: results / stage.name for stage in with_records(stages, results)}
    graded = {stage: load(each, load_records([each])) for stage, each in folders.items()}
    found = {stage: records for stage, records in graded.items() if records}
    header = ["", *chain(*((f"{stage.task}, {stage.steps} steps", ALIKE) for stage in found))]
    return grid(header, [*map(_at_temperature, found.values())], n_columns=2) if found else ""


def _at_temperature(records: list[Record]) -> dict[str, tuple[str, ...]]:
    """Return the cells of each variant from the records of a temperature.jsonl."""
    return {
        each.row.variant: tuple(
            plain(times(compared.difference)) if compared else ""
            for compared in (each.row.versus_base, each.all_else_equal)
        )
        for each in ranked(records)
        if each.row.versus_base
    }


def tuning_table(results: Path = RESULTS) -> str:
    """Count the optimizers whose tuning seeds would each choose a different rate."""
    stages = with_records(STAGES + ABLATIONS, results)
    rows = [(stage.name, _disagreeing(load_records([results / stage.name]))) for stage in stages]
    return markdown(("stage", "optimizers"), rows) if rows else ""


def _disagreeing(records: list[Record]) -> str:
    tuning = by_variant(r for r in records if r["role"] == "tuning" and is_finished(r))
    best = [
        {min(runs, key=val_loss)["lr"] for runs in grouped(own, itemgetter("seed")).values()}
        for own in tuning.values()
    ]
    return f"{sum(len(rates) > 1 for rates in best)} of {len(best)}"


def all_tables(results: Path = RESULTS) -> str:
    """Return every table with its heading, after an explanation."""
    about = " ".join((__doc__ or "").split("\n\n")[-1].split())
    parts = [
        "# The rollout study",
        "`python -m studies.rollout.tables` makes these tables from the records here. " + about,
    ]
    for heading in GROUPS:
        if text := group_table(heading, results):
            parts += [f"## {heading}", text]
    more = {
        "Each change against exact DoPr with γ = 0.1": changes_table(results),
        "All against plain Muon, each at its own rate": against_table("muon", results),
        "At equal validation": equal_validation_table(results),
        "Each at its own temperature": temperature_table(STAGES, results),
        "Ablations, each at its own temperature": temperature_table(ABLATIONS, results),
        "Whose tuning seeds disagree on the best learning rate": tuning_table(results),
    }
    for heading, text in more.items():
        if text:
            parts += [f"## {heading}", text]
    return "\n\n".join(parts)


def main(argv: list[str]) -> None:
    parser = command_parser("studies.rollout.tables", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the stages")
    parser.add_argument("--out", type=Path, help="write the tables to this file")
    arguments = parser.parse_args(argv)
    try:
        text = all_tables(arguments.results)
    except AnalysisError as error:
        parser.exit(2, f"error: {error}\n")
    if arguments.out:
        write_atomic(arguments.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
