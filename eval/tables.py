"""Tables for a terminal: aligned columns, numbers with their intervals."""

from collections.abc import Iterable, Sequence

from eval.analysis import Row
from eval.intervals import Estimate, Paired
from eval.matched import Matched
from eval.typeset import times


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub's Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def leaderboard_table(
    rows: Sequence[Row],
    references: dict[str, tuple[Estimate, Estimate]],
    metric: str,
    *,
    higher_is_better: bool,
) -> str:
    """Best first: mean ± half of the 95 % interval over seeds, the rollout error over the base's.

    references: validation loss and metric of what no optimizer made; they stand below.
    """
    direction = "higher" if higher_is_better else "lower"
    header = ["optimizer", "lr", "val loss", f"{metric} ({direction} is better)"]
    cells = [[*header, "error / base's", "wins", "p", "diverged"]]
    for row in rows:
        values = number(row.val_loss), number(row.primary)
        versus = row.versus_base
        compared = ("", "", "") if versus is None else _compared(versus)
        cells.append([row.variant, f"{row.lr:g}", *values, *compared, str(row.n_diverged or "")])
    for name, values in references.items():
        cells.append([name, "", *map(number, values), "", "", "", ""])
    return aligned(cells)


def matched_table(matched: dict[str, Matched]) -> str:
    """The rollout error over the base's, at equal validation."""
    cells = [("optimizer", "error / base's at equal validation", "seeds compared")]
    for variant, each in matched.items():
        cells.append((variant, " ".join(times(each.residual)), f"{each.n_inside}/{each.n}"))
    return aligned(cells)


def number(value: Estimate) -> str:
    """mean ± half of the interval, to four significant digits."""
    return f"{value.mean:.4g} ± {(value.hi - value.lo) / 2:.2g}"


def _compared(versus: Paired) -> tuple[str, str, str]:
    wins = f"{versus.wins}/{versus.n_pairs}"
    return " ".join(times(versus.difference)), wins, f"{versus.p:.2g}"
