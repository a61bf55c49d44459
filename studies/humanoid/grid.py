"""Print the grid of the humanoid study: the return of every optimizer in every mode.

    python -m studies.humanoid.grid studies/results/humanoid

Returns are means over seeds. **Bold** ones are above the base's, and *italic* ones below, with 95 %
intervals that exclude zero, both at the variant's own learning rate and with the base at the same
rate. The last column is the difference between exact and fast mode.
"""

import sys
from pathlib import Path

from eval.command import command_parser, reported_errors
from eval.tables import markdown
from studies.humanoid.all_stages import GRID, MODES
from studies.humanoid.tables import at_rate, difference, mean_of, with_half
from studies.rollout.all_stages import BASES
from studies.stats.errors import primary
from studies.stats.records import (
    RECORDS,
    AnalysisError,
    Record,
    by_variant,
    is_finished,
    is_reported,
    read_records,
)

BASE, EXACT, FAST, FRESH_MEAN = MODES
SHOWN = (BASE, FAST, FRESH_MEAN, EXACT)
HEADER = ("setting", "", "alone", "fast", "fresh mean", "exact", "exact minus fast")


def grid_table(folder: Path) -> str:
    """Return a row for each setting and optimizer of the grid that ran.

    Raises AnalysisError if there are none.
    """
    rows = []
    for stage in GRID:
        records, name = read_records(folder / stage.name / RECORDS), stage.name[len("grid-") :]
        fresh = by_variant(filter(is_reported, records))
        rows += [(f"`{name}`", *_row(records, fresh, base)) for base in BASES if base in fresh]
    if not rows:
        raise AnalysisError(f"{folder} has no records of the grid")
    return markdown(HEADER, rows)


def _row(records: list[Record], fresh: dict[str, list[Record]], base: str) -> tuple[str, ...]:
    """Return the cells of an optimizer in one setting."""
    runs = {mode: fresh.get(mode.format(base), []) for mode in SHOWN}
    cells = [_cell(records, own, runs[BASE]) for own in runs.values()]
    against_fast = with_half(difference(runs[EXACT], runs[FAST]), "+,.0f")
    return f"`{base}`", *cells, against_fast


def _cell(records: list[Record], own: list[Record], base: list[Record]) -> str:
    """Return the mean return, marked if it clearly differs from the base's at both rates."""
    finished = [record for record in own if is_finished(record)]
    if not finished:
        return "diverged" if own else ""
    lost = f" ({len(own) - len(finished)} diverged)" if len(finished) < len(own) else ""
    mean = mean_of([primary(record) for record in finished], ",.0f")
    same_rate = at_rate(records, base[0]["variant"], own[0]["lr"])
    both = [difference(own, others) for others in (base, same_rate)]
    if all(each.lo > 0 for each in both):
        mean = f"**{mean}**"
    elif all(each.hi < 0 for each in both):
        mean = f"*{mean}*"
    return mean + lost


def main(argv: list[str]) -> None:
    parser = command_parser("studies.humanoid.grid", __doc__)
    parser.add_argument("folder", type=Path, help="--out of studies.humanoid.all_stages")
    arguments = parser.parse_args(argv)
    with reported_errors(parser):
        print(grid_table(arguments.folder))


if __name__ == "__main__":
    main(sys.argv[1:])
