"""Leaderboards and comparisons as text tables, with confidence intervals."""

import math
from collections.abc import Sequence

from eval.rollout.intervals import MIN_SEEDS, Estimate
from eval.tables import aligned
from studies.report.format import NONE, times
from studies.stats.analysis import LeaderboardRow
from studies.stats.matched import Matched
from studies.stats.seeds import Paired


def leaderboard_text(
    rows: Sequence[LeaderboardRow],
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

    what: as studies.stats.matched.quantity says it.
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
