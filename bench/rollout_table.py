"""Tables of the rollout study in Markdown, as README.md has them.

    python -m bench.rollout_table bench/results/study/pdfa-500 bench/results/study/ctrl-500

A line for each variant with DoPr, two columns for each folder: its rollout error as a multiple of
its base's, each at its own learning rate, and of its base's at the variant's. 95 % intervals over
seeds; * stands for p below 0.05 / --comparisons where both say the same.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.rollout_study import ABLATIONS, STAGES, planned
from eval.analysis import AnalysisError, load_records
from eval.board import Versus
from eval.command import command_parser
from eval.consistency import check, knobs_of
from eval.sections import Section, make_sections
from eval.tables import markdown
from eval.typeset import Cell

ORDER = [*dict.fromkeys(name for stage in STAGES + ABLATIONS for name in stage.optimizers)]
EQUAL = "at equal rates"


def table(folders: Sequence[Path], n_planned: int) -> str:
    """Raises AnalysisError for a folder without a study, or records that do not belong together."""
    sections = _sections(folders, n_planned)
    header = [""]
    for section in sections:
        error = f"1 - {section.metric}" if section.higher_is_better else section.metric
        header += [f"{section.name}, {section.steps} steps: {error}", EQUAL]
    boards = [{e.variant: e.versus for e in section.entries if e.versus} for section in sections]
    names = sorted({name for board in boards for name in board}, key=_place)
    rows = [
        [name, *(cell for board in boards for cell in _cells(board.get(name)))] for name in names
    ]
    return markdown(header, rows)


def _sections(folders: Sequence[Path], n_planned: int) -> list[Section]:
    """In the order of the folders."""
    records = load_records(folders)
    check(records)
    boards = list(dict.fromkeys((knobs_of(r["spec"]), r["steps"]) for r in records))
    found = make_sections(records, n_planned)
    return sorted(found, key=lambda each: boards.index((each.knobs, each.steps)))


def _place(name: str) -> tuple[int, str]:
    """As the study lists them; others behind."""
    return (ORDER.index(name) if name in ORDER else len(ORDER)), name


def _cells(versus: Versus | None) -> tuple[str, str]:
    if versus is None:
        return "", ""
    star = " *" if versus.is_strict else ""
    return _plain(versus.error) + star, _plain(versus.at_this_rate)


def _plain(cell: Cell) -> str:
    return " ".join(filter(None, cell)).removeprefix("× ")


def main(argv: list[str]) -> None:
    parser = command_parser("rollout_table", __doc__, "bench")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of eval.compare")
    parser.add_argument("--comparisons", type=int, default=planned(STAGES), help="of the family")
    arguments = parser.parse_args(argv)
    try:
        print(table(arguments.folders, arguments.comparisons))
    except AnalysisError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
