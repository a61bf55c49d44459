"""What the rollout study left: its stages that have run, in its order, and how they are tabled."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from eval.tables import markdown
from studies.report.format import Cell
from studies.report.sections import Section, make_sections
from studies.rollout.all_stages import ABLATIONS, STAGES, RolloutStage, planned
from studies.stats.analysis import load_records
from studies.stats.consistency import check, knobs_of

RESULTS = Path(__file__).parents[1] / "results" / "rollout"
GROUPS = {
    "500 steps": [stage for stage in STAGES if stage.steps == 500],
    "1,500 steps": [stage for stage in STAGES if stage.steps == 1500],
    "`lds`": [stage for stage in STAGES if stage.task.startswith("lds")],
    "Ablations": list(ABLATIONS),
}
ORDER = [*dict.fromkeys(name for stage in STAGES + ABLATIONS for name in stage.optimizers)]


def place(variant: str) -> tuple[int, str]:
    """By which variants are sorted: those of the study first, in its order."""
    return (ORDER.index(variant) if variant in ORDER else len(ORDER)), variant


def grid(header: list[str], boards: list[dict[str, tuple[str, ...]]], n_columns: int) -> str:
    """A line a variant, in the order of the study; empty cells where a board has it not."""
    names = sorted({name for board in boards for name in board}, key=place)
    empty = ("",) * n_columns
    rows = [[name, *chain(*(board.get(name, empty) for board in boards))] for name in names]
    return markdown(header, rows)


def family_of(stages: Sequence[RolloutStage]) -> int:
    """The planned comparisons that these are judged with."""
    return planned(ABLATIONS if stages[0] in ABLATIONS else STAGES)


def sections_of(stages: Sequence[RolloutStage], results: Path) -> list[Section]:
    """Those that have records, in this order, judged by the comparisons of their family.

    Raises AnalysisError for records that do not belong together.
    """
    records = load_records(results / stage.name for stage in with_records(stages, results))
    check(records)
    boards = list(dict.fromkeys((knobs_of(r["spec"]), r["steps"]) for r in records))
    found = make_sections(records, family_of(stages))
    return sorted(found, key=lambda each: boards.index((each.knobs, each.steps)))


def with_records(stages: Sequence[RolloutStage], results: Path) -> list[RolloutStage]:
    """Those that have run, perhaps in part."""
    paths = {stage: results / stage.name / "records.jsonl" for stage in stages}
    return [stage for stage, path in paths.items() if path.exists() and path.stat().st_size]


def plain(cell: Cell) -> str:
    return " ".join(filter(None, cell)).removeprefix("× ")
