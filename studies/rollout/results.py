"""Read the results of the rollout study, and arrange them in tables in the study's order."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from eval.tables import markdown
from studies.report.format import Cell, times
from studies.report.sections import Section, make_sections
from studies.rollout.all_stages import ABLATIONS, STAGES, RolloutStage, planned
from studies.stats.analysis import Compared
from studies.stats.consistency import check, knobs_of
from studies.stats.records import RECORDS, load_records, stored

RESULTS = Path(__file__).parents[1] / "results" / "rollout"
GROUPS = {
    "500 steps": [stage for stage in STAGES if stage.steps == 500],
    "1,500 steps": [stage for stage in STAGES if stage.steps == 1500],
    "`lds`": [stage for stage in STAGES if stage.task.startswith("lds")],
    "Ablations": list(ABLATIONS),
}
ORDER = [*dict.fromkeys(name for stage in STAGES + ABLATIONS for name in stage.optimizers)]


def place(variant: str) -> tuple[int, str]:
    """Return a sort key: the variants of the study in its order, then other variants."""
    return (ORDER.index(variant) if variant in ORDER else len(ORDER)), variant


def grid(header: list[str], boards: list[dict[str, tuple[str, ...]]], n_columns: int) -> str:
    """Return a Markdown table with a row for each variant.

    Cells are empty where a board, {variant: cells}, lacks the variant.
    """
    names = sorted({name for board in boards for name in board}, key=place)
    empty = ("",) * n_columns
    rows = [[name, *chain(*(board.get(name, empty) for board in boards))] for name in names]
    return markdown(header, rows)


def sections_of(stages: Sequence[RolloutStage], results: Path) -> list[Section]:
    """Return the sections of the stages that have records, in the order of the stages.

    Stars use the comparisons of the whole family. Raises AnalysisError if the records do not belong
    together.
    """
    records = load_records(results / stage.name for stage in with_records(stages, results))
    check(records)
    boards = list(dict.fromkeys((knobs_of(r["spec"]), r["steps"]) for r in records))
    family = planned(ABLATIONS if stages[0] in ABLATIONS else STAGES)
    found = make_sections(records, family)
    return sorted(found, key=lambda each: boards.index((each.knobs, each.steps)))


def with_records(stages: Sequence[RolloutStage], results: Path) -> list[RolloutStage]:
    """Return the stages that have run, at least in part."""
    paths = {stage: stored(results / stage.name / RECORDS) for stage in stages}
    return [stage for stage, path in paths.items() if path and path.stat().st_size]


def plain(cell: Cell) -> str:
    """Join a cell without its multiplication sign."""
    return " ".join(filter(None, cell)).removeprefix("× ")


def ratio(compared: Compared | None) -> str:
    """Format a ratio of errors with its interval; "" without pairs."""
    return plain(times(compared.difference)) if compared else ""
