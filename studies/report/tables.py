"""Format leaderboards and comparisons as text tables with confidence intervals."""

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
    """Return the leaderboard as text: means ± half of the 95 % interval, median, ratio to the base.

    references: validation loss and metric of the reference policies, which come last.
    """
    direction = "higher" if higher_is_better else "lower"
    header = ["optimizer", "lr", "val loss", f"{metric} ({direction} is better)", "median"]
    against = ["error / base's", "wins", "p", "error / base's at this lr"]
    cells = [[*header, *against, "diverged"]]
    for row in rows:
        means = mean_and_half(row.val_loss), mean_and_half(row.primary)
        values = *means, f"{row.median:.4g}"
        against = compared(row.versus_base) if row.versus_base else ("", "", "")
        at_this_lr = compared(row.at_this_rate)[0] if row.at_this_rate else ""
        diverged = str(row.n_diverged or "")
        cells.append([row.variant, f"{row.lr:g}", *values, *against, at_this_lr, diverged])
    for name, values in references.items():
        cells.append([name, "", *map(mean_and_half, values), *[""] * 6])
    return aligned(cells)


def matched_text(matched: dict[str, Matched], what: str) -> str:
    """Return a table of rollout errors (or odds) over the base's at equal validation, or "".

    what: the name of the quantity, from studies.stats.matched.quantity.
    """
    if not matched:
        return ""
    cells = [("optimizer", f"{what} / base's at equal validation", "seeds compared")]
    for variant, each in matched.items():
        cells.append((variant, " ".join(times(each.residual)), f"{each.n_inside}/{each.n}"))
    return aligned(cells)


def mean_and_half(value: Estimate) -> str:
    """Format a mean with four significant digits and half of its interval, if it has one."""
    if math.isnan(value.mean):
        return NONE
    half = (value.hi - value.lo) / 2
    return f"{value.mean:.4g}" + ("" if math.isnan(half) else f" ± {half:.2g}")


def compared(versus: Paired) -> tuple[str, str, str]:
    """Return the ratio of errors with its interval, the wins, and p if there are enough seeds."""
    wins = f"{versus.wins}/{versus.n_pairs}"
    return (
        " ".join(times(versus.difference)),
        wins,
        f"{versus.p:.2g}" if versus.difference.n >= MIN_SEEDS else "",
    )
