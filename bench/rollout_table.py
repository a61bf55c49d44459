"""The tables of the rollout study in Markdown: a line a variant with DoPr, two columns a stage.

    python -m bench.rollout_table [--out bench/results/study/tables.md]

The rollout error as a multiple of the base's, each at its own learning rate, and of the base's at
the variant's. 95 % intervals over seeds; * stands for p below 0.05 / the comparisons of the family,
where both say the same.
"""

import math
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from bench.rollout_study import ABLATIONS, STAGES, Stage, planned
from checkpoint import write_atomic
from eval.analysis import AnalysisError, Record, leaderboard, load_records
from eval.board import Versus
from eval.command import command_parser
from eval.consistency import check, knobs_of
from eval.matched import matched_validation, placebo, quantity
from eval.remarks import rank_agreement
from eval.sections import Section, make_sections
from eval.tables import markdown
from eval.tempered import load, ranked
from eval.typeset import Cell, factor, pair, times

RESULTS = Path(__file__).parent / "results" / "study"
GROUPS = {
    "500 steps": [stage for stage in STAGES if stage.steps == 500],
    "1,500 steps": [stage for stage in STAGES if stage.steps == 1500],
    "`lds`": [stage for stage in STAGES if stage.task.startswith("lds")],
    "Ablations": list(ABLATIONS),
}
ORDER = [*dict.fromkeys(name for stage in STAGES + ABLATIONS for name in stage.optimizers)]
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
    return _grid(header, boards, n_columns=2)


def changes_table(results: Path = RESULTS) -> str:
    """Each change of the ablations against DoPr without it; empty where none has run."""
    found = {
        stage: load_records([results / stage.name]) for stage in _with_records(ABLATIONS, results)
    }
    header = [""]
    for stage, records in found.items():
        metric = records[0]["primary"]
        header += [f"{stage.task}: {metric}", "validation loss, nats", "learning rates"]
    return _grid(header, [*map(_changed, found.values())], n_columns=3) if found else ""


def _changed(records: list[Record]) -> dict[str, tuple[str, ...]]:
    """The cells of each change: ratio of rollout errors, difference of losses, both rates."""
    with_dopr = [record for record in records if record["variant"].startswith("dopr-")]
    rows = leaderboard([record | {"base": f"dopr-{record['base']}"} for record in with_dopr])
    rates = {row.variant: row.lr for row in rows}
    return {
        row.variant: (
            _plain(times(row.versus_base.difference)),
            _plain(pair(row.val_versus_base.difference, sign=True)),
            f"{row.lr:g} / {rates[row.base]:g}",
        )
        for row in rows
        if row.versus_base and row.val_versus_base
    }


def equal_validation_table(results: Path = RESULTS) -> str:
    """Rollout errors at equal validation, over the base's, and what unrelated bases differ by."""
    sections = sections_of([*GROUPS["500 steps"], *GROUPS["1,500 steps"]], results)
    header = [""]
    for each in sections:
        header += [f"{each.name}, {each.steps} steps: {quantity(each.records[0])}", "seeds"]
    return _grid(header, [*map(_equal_validation, sections)], n_columns=2) if sections else ""


def _equal_validation(section: Section) -> dict[str, tuple[str, ...]]:
    """The cells of each variant; last, how far two bases are apart, and how orders agree."""
    cells = {
        name: (_plain(times(found.residual)), f"{found.n_inside}/{found.n}")
        for name, found in matched_validation(section.records).items()
    }
    if apart := [abs(each.mean) for each in placebo(section.records).values()]:
        cells[BASES_APART] = factor(max(apart)), ""
    tau, n = rank_agreement(section.records) or (math.nan, 0)
    return cells if math.isnan(tau) else cells | {TAU: (f"{tau:.2f}", f"{n} optimizers")}


def temperature_table(results: Path = RESULTS) -> str:
    """At each optimizer's own best temperature, of the stages that eval.temperature was run on."""
    folders = {stage: results / stage.name for stage in _with_records(STAGES + ABLATIONS, results)}
    graded = {stage: load(each, load_records([each])) for stage, each in folders.items()}
    found = {stage: records for stage, records in graded.items() if records}
    header = ["", *chain(*((f"{stage.task}, {stage.steps} steps", ALIKE) for stage in found))]
    return _grid(header, [*map(_tempered, found.values())], n_columns=2) if found else ""


def _tempered(records: list[Record]) -> dict[str, tuple[str, ...]]:
    """The cells of each variant, of a temperature.jsonl."""
    return {
        each.row.variant: tuple(
            _plain(times(compared.difference)) if compared else ""
            for compared in (each.row.versus_base, each.all_else_equal)
        )
        for each in ranked(records)
        if each.row.versus_base
    }


def place(variant: str) -> tuple[int, str]:
    """By which variants are sorted: those of the study first, in its order."""
    return (ORDER.index(variant) if variant in ORDER else len(ORDER)), variant


def _grid(header: list[str], boards: list[dict[str, tuple[str, ...]]], n_columns: int) -> str:
    """A line a variant, in the order of the study; empty cells where a board has it not."""
    names = sorted({name for board in boards for name in board}, key=place)
    empty = ("",) * n_columns
    rows = [[name, *chain(*(board.get(name, empty) for board in boards))] for name in names]
    return markdown(header, rows)


def _family(stages: Sequence[Stage]) -> int:
    """The planned comparisons that these are judged with."""
    return planned(ABLATIONS if stages[0] in ABLATIONS else STAGES)


def sections_of(stages: Sequence[Stage], results: Path) -> list[Section]:
    """Those that have records, in this order, judged by the comparisons of their family.

    Raises AnalysisError for records that do not belong together.
    """
    records = load_records(results / stage.name for stage in _with_records(stages, results))
    check(records)
    boards = list(dict.fromkeys((knobs_of(r["spec"]), r["steps"]) for r in records))
    found = make_sections(records, _family(stages))
    return sorted(found, key=lambda each: boards.index((each.knobs, each.steps)))


def _with_records(stages: Sequence[Stage], results: Path) -> list[Stage]:
    """Those that have run, perhaps in part."""
    paths = {stage: results / stage.name / "records.jsonl" for stage in stages}
    return [stage for stage, path in paths.items() if path.exists() and path.stat().st_size]


def _cells(versus: Versus) -> tuple[str, str]:
    star = " *" if versus.is_strict else ""
    return _plain(versus.error) + star, _plain(versus.at_this_rate)


def _plain(cell: Cell) -> str:
    return " ".join(filter(None, cell)).removeprefix("× ")


def all_tables(results: Path = RESULTS) -> str:
    """Every group with a heading, and how to read them."""
    about = " ".join((__doc__ or "").split("\n\n")[-1].split())
    parts = [
        "# The rollout study",
        "`python -m bench.rollout_table`, of the records here. " + about,
    ]
    for heading in GROUPS:
        if text := group_table(heading, results):
            parts += [f"## {heading}", text]
    if text := changes_table(results):
        parts += ["## Each change against exact DoPr with γ = 0.1", text]
    if text := equal_validation_table(results):
        parts += ["## At equal validation", text]
    if text := temperature_table(results):
        parts += ["## Each at its own temperature", text]
    return "\n\n".join(parts)


def main(argv: list[str]) -> None:
    parser = command_parser("rollout_table", __doc__, "bench")
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
