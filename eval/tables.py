"""Tables for a terminal: aligned columns, numbers with their intervals."""

from collections.abc import Iterable, Sequence

from eval.analysis import Row
from eval.intervals import Estimate, Paired
from eval.matched import Matched


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def leaderboard_table(rows: Sequence[Row], metric: str, *, higher_is_better: bool) -> str:
    """Best first: mean and 95 % interval over seeds, and the difference to the base optimizer."""
    direction = "higher" if higher_is_better else "lower"
    header = ["optimizer", "lr", "val loss", f"{metric} ({direction} is better)"]
    cells = [[*header, "minus base", "wins", "p", "diverged"]]
    for row in rows:
        values = number(row.val_loss), number(row.primary)
        versus = row.versus_base
        compared = ("", "", "") if versus is None else _compared(versus)
        cells.append([row.variant, f"{row.lr:g}", *values, *compared, str(row.n_diverged or "")])
    return aligned(cells)


def matched_table(matched: dict[str, Matched]) -> str:
    """The logarithm of rollout error against the base's, at equal validation."""
    cells = [("optimizer", "log rollout error minus base's at equal validation", "seeds compared")]
    for variant, each in matched.items():
        cells.append((variant, number(each.residual), f"{each.n_inside}/{each.n}"))
    return aligned(cells)


def number(value: Estimate) -> str:
    """mean ± half of the interval, to four significant digits."""
    return f"{value.mean:.4g} ± {(value.hi - value.lo) / 2:.2g}"


def _compared(versus: Paired) -> tuple[str, str, str]:
    wins = f"{versus.wins}/{versus.n_pairs}"
    return number(versus.difference), wins, f"{versus.p:.2g}"
