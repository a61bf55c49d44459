"""Tables for a terminal: aligned columns, numbers with their intervals."""

import math
from collections.abc import Iterable, Sequence

from eval.analysis import Row
from eval.intervals import MIN_SEEDS, Estimate, Paired
from eval.matched import Matched
from eval.typeset import NONE, times


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub's Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def leaderboard_text(
    rows: Sequence[Row],
    references: dict[str, tuple[Estimate, Estimate]],
    metric: str,
    *,
    higher_is_better: bool,
) -> str:
    """In order: mean ± half of the 95 % interval over seeds, median, ratio to the base's error.

    references: validation loss and metric of what no optimizer made; they stand below.
    """
    direction = "higher" if higher_is_better else "lower"
    header = ["optimizer", "lr", "val loss", f"{metric} ({direction} is better)", "median"]
    against = ["error / base's", "wins", "p", "error / base's at this lr"]
    cells = [[*header, *against, "diverged"]]
    for row in rows:
        means = mean_and_half(row.val_loss), mean_and_half(row.primary)
        values = *means, f"{row.median:.4g}"
        against = compared(row.versus_base) if row.versus_base else ("", "", "")
        here = compared(row.at_this_rate)[0] if row.at_this_rate else ""
        diverged = str(row.n_diverged or "")
        cells.append([row.variant, f"{row.lr:g}", *values, *against, here, diverged])
    for name, values in references.items():
        cells.append([name, "", *map(mean_and_half, values), *[""] * 6])
    return aligned(cells)


def matched_text(matched: dict[str, Matched], what: str) -> str:
    """The rollout error, or its odds, over the base's at equal validation; empty if there is none.

    what: as eval.matched.quantity says it.
    """
    if not matched:
        return ""
    cells = [("optimizer", f"{what} / base's at equal validation", "seeds compared")]
    for variant, each in matched.items():
        cells.append((variant, " ".join(times(each.residual)), f"{each.n_inside}/{each.n}"))
    return aligned(cells)


def mean_and_half(value: Estimate) -> str:
    """mean ± half of the interval, to four significant digits; the mean alone without one."""
    if math.isnan(value.mean):
        return NONE
    half = (value.hi - value.lo) / 2
    return f"{value.mean:.4g}" + ("" if math.isnan(half) else f" ± {half:.2g}")


def compared(versus: Paired) -> tuple[str, str, str]:
    """The ratio of errors with its interval, wins, and p where there are enough seeds."""
    wins = f"{versus.wins}/{versus.n_pairs}"
    return (
        " ".join(times(versus.difference)),
        wins,
        f"{versus.p:.2g}" if versus.difference.n >= MIN_SEEDS else "",
    )
