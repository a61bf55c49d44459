"""The tables of the rollout study in Markdown: a line a variant with DoPr, two columns a stage.

    python -m studies.rollout.tables [--out studies/results/rollout/tables.md]

The rollout error as a multiple of the base's, each at its own learning rate, and of the base's at
the variant's. 95 % intervals over seeds; * stands for p below 0.05 / the comparisons of the family,
where both say the same.
"""

import math
import sys
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path

from eval.command import command_parser
from eval.tables import markdown
from studies.report.format import factor, times
from studies.report.leaderboard import Versus
from studies.report.sections import Section
from studies.report.summary_text import rank_agreement
from studies.rollout.ablations import changes_table
from studies.rollout.all_stages import ABLATIONS, STAGES, RolloutStage
from studies.rollout.results import GROUPS, RESULTS, grid, plain, sections_of, with_records
from studies.stats.analysis import (
    AnalysisError,
    Record,
    by_variant,
    grouped,
    is_finished,
    leaderboard,
    load_records,
    val_loss,
)
from studies.stats.matched import matched_validation, placebo, quantity
from studies.stats.temperatures import load, ranked
from trainer.checkpoint.read import write_atomic

EQUAL = "at equal rates"
ALIKE = "at equal rates and temperatures"
BASES_APART = "**two bases differ by up to**"
TAU = "**Kendall's tau of validation and rollouts**"


def group_table(heading: str, results: Path = RESULTS) -> str:
    """The table of those stages of a group that have records; empty if none has."""
    sections = sections_of(GROUPS[heading], results)
    return table(sections) if sections else ""


def table(sections: Sequence[Section]) -> str:
    """Two columns a section: as planned, and at equal rates."""
    header = [""]
    for section in sections:
        error = f"1 - {section.metric}" if section.higher_is_better else section.metric
        header += [f"{section.name}, {section.steps} steps: {error}", EQUAL]
    boards = [
        {entry.variant: _cells(entry.versus) for entry in section.entries if entry.versus}
        for section in sections
    ]
    return grid(header, boards, n_columns=2)


def against_table(base: str, results: Path = RESULTS) -> str:
    """Every optimizer against one that needs no base of its own, each at its own rate."""
    sections = sections_of([*GROUPS["500 steps"], *GROUPS["1,500 steps"]], results)
    header = ["", *(f"{each.name}, {each.steps} steps" for each in sections)]
    boards = []
    for section in sections:
        rows = leaderboard([record | {"base": base} for record in section.records])
        compared = {row.variant: row.versus_base for row in rows if row.versus_base}
        boards.append({name: (plain(times(d.difference)),) for name, d in compared.items()})
    return grid(header, boards, n_columns=1) if sections else ""


def equal_validation_table(results: Path = RESULTS) -> str:
    """Rollout errors at equal validation, over the base's, and what unrelated bases differ by."""
    sections = sections_of([*GROUPS["500 steps"], *GROUPS["1,500 steps"]], results)
    header = [""]
    for each in sections:
        header += [f"{each.name}, {each.steps} steps: {quantity(each.records[0])}", "seeds"]
    return grid(header, [*map(_equal_validation, sections)], n_columns=2) if sections else ""


def _equal_validation(section: Section) -> dict[str, tuple[str, ...]]:
    """The cells of each variant; last, how far two bases are apart, and how orders agree."""
    cells = {
        name: (plain(times(found.residual)), f"{found.n_inside}/{found.n}")
        for name, found in matched_validation(section.records).items()
    }
    if apart := [abs(each.mean) for each in placebo(section.records).values()]:
        cells[BASES_APART] = factor(max(apart)), ""
    tau, n = rank_agreement(section.records) or (math.nan, 0)
    return cells if math.isnan(tau) else cells | {TAU: (f"{tau:.2f}", f"{n} optimizers")}


def temperature_table(stages: Sequence[RolloutStage], results: Path = RESULTS) -> str:
    """At each optimizer's own best temperature, of the stages that studies.sweep.temperature was run on."""
    folders = {stage: results / stage.name for stage in with_records(stages, results)}
    graded = {stage: load(each, load_records([each])) for stage, each in folders.items()}
    found = {stage: records for stage, records in graded.items() if records}
    header = ["", *chain(*((f"{stage.task}, {stage.steps} steps", ALIKE) for stage in found))]
    return grid(header, [*map(_tempered, found.values())], n_columns=2) if found else ""


def _tempered(records: list[Record]) -> dict[str, tuple[str, ...]]:
    """The cells of each variant, of a temperature.jsonl."""
    return {
        each.row.variant: tuple(
            plain(times(compared.difference)) if compared else ""
            for compared in (each.row.versus_base, each.all_else_equal)
        )
        for each in ranked(records)
        if each.row.versus_base
    }


def _cells(versus: Versus) -> tuple[str, str]:
    star = " *" if versus.is_strict else ""
    return plain(versus.error) + star, plain(versus.at_this_rate)


def tuning_table(results: Path = RESULTS) -> str:
    """Of how many optimizers the tuning seeds, each alone, would choose different rates."""
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
    """Every group with a heading, and how to read them."""
    about = " ".join((__doc__ or "").split("\n\n")[-1].split())
    parts = [
        "# The rollout study",
        "`python -m studies.rollout.tables`, of the records here. " + about,
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
    parser.add_argument("--out", type=Path, help="write them to this file")
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
