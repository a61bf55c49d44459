"""Write the tables of the study: means of the metrics, and ratios to the base."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from eval.tables import markdown
from studies.flow.comparison import Metrics, as_ratio, log_ratio, matched

if TYPE_CHECKING:
    from studies.flow.study import Comparison

MEANS = ("", "", "", "lr", "excess", "paired", "sliced", "off_curve")
RATIOS = (
    *("", "", "", "excess", "same lr", "paired", "same lr"),
    *("paired at equal excess", "sliced at equal excess", "off_curve at equal excess"),
)


def means_table(comparisons: Sequence[Comparison]) -> str:
    """Return the means over seeds of all metrics, at the tuned rates."""
    return markdown(MEANS, [row for each in comparisons for row in _means(each)])


def _means(each: Comparison) -> Iterator[tuple[str, ...]]:
    for mode, lr in each.rates.items():
        runs = each.at(mode, lr)
        metrics = (_mean(runs, metric) for metric in MEANS[4:])
        yield each.target, each.optimizer, mode, f"{lr:g}", *metrics


def _mean(runs: Sequence[Metrics], metric: str) -> str:
    """Format the mean and the standard deviation over seeds; "" if no run has the metric."""
    values = [run[metric] for run in runs if run and metric in run]
    if len(values) < 2:
        return ""
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.2g}"


def ratios_table(comparisons: Sequence[Comparison]) -> str:
    """Return the ratios to the base, with 95 % intervals and, in brackets, the number of seeds.

    DoPr has no part in two kinds of rows: the base at the rate of a mode, and Muon against AdamW.
    """
    rows = [row for each in comparisons for row in _ratios(each)]
    adamw = {each.target: each for each in comparisons if each.optimizer == "adamw"}
    for each in comparisons:
        if each.optimizer != "adamw" and (base := adamw.get(each.target)):
            own = each.at("base", each.rates["base"])
            name = (each.target, each.optimizer, "against adamw")
            rows.append(_row(name, own, each.lengths("base"), base))
    return markdown(RATIOS, rows)


def _ratios(each: Comparison) -> Iterator[tuple[str, ...]]:
    """Yield a row for each mode of DoPr, and for the base at each other rate."""
    name = (each.target, each.optimizer)
    for mode, lr in each.rates.items():
        if mode != "base":
            own, same_lr = each.at(mode, lr), each.at("base", lr)
            yield _row((*name, mode), own, each.lengths(mode), each, same_lr)
    for lr in sorted({*each.rates.values()} - {each.rates["base"]}):
        own = each.at("base", lr)
        yield _row((*name, f"base, lr {lr:g}"), own, [[run] for run in own], each)


def _row(
    name: tuple[str, ...],
    own: Sequence[Metrics],
    lengths: Sequence[Sequence[Metrics]],
    base: Comparison,
    same_lr: Sequence[Metrics] | None = None,
) -> tuple[str, ...]:
    """Return one row of ratios.

    own: for each seed, the metrics after the number of steps of the tuning runs.
    lengths: for each seed, the metrics after several numbers of steps.
    base, same_lr: what to divide by; same_lr are runs of the base at the learning rate of `own`.
    """
    tuned = base.at("base", base.rates["base"])
    cells = []
    for metric in ("excess", "paired"):
        cells.append(as_ratio(log_ratio(own, tuned, metric)))
        cells.append(as_ratio(log_ratio(own, same_lr, metric)) if same_lr else "")
    for metric in ("paired", "sliced", "off_curve"):
        is_graded = any(run and metric in run for run in own)
        equal = as_ratio(matched(lengths, base.lengths("base"), metric)) if is_graded else ""
        cells.append(equal)
    return (*name, *cells)
