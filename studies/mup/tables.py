"""Write the tables of a width sweep in Markdown: every width, and a verdict on each optimizer."""

import math
from operator import itemgetter
from typing import Any

import numpy as np

from eval.rollout.intervals import Estimate
from eval.tables import markdown
from optim.schedule import lr_scale
from studies.mup.slopes import slope, widths_of
from studies.mup.transfer import (
    Losses,
    Optimum,
    losses_by_width,
    optimum,
    regret,
    shift,
    steps_where_wider_is_worse,
    tuned,
)
from studies.stats.records import Record, grouped

MAX_SHIFT, MAX_REGRET = 1.0, 0.01  # muP: octaves over all widths, share of the loss
MIN_SHIFT, MIN_REGRET = 2 / 3, 0.03  # sp, the control: octaves per doubling, share of the loss
MIN_OCTAVES = 2  # the least range of widths that has a verdict
RATIOS = {"independent": (0.0, 0.2), "constant": (-0.5, 0.25)}  # slope of ‖ΔW‖/‖W‖, tolerance
SETTLED = 3.0  # η λ summed over steps, after which updates and decay are in equilibrium


def tables(records: list[Record]) -> str:
    """Return the verdicts, the widths, and an explanation of the columns."""
    rows, verdicts = [], []
    for (variant, kind), own in grouped(records, itemgetter("variant", "parametrisation")).items():
        losses = {width: each for width, each in losses_by_width(own).items() if each}
        if losses:
            optima = {width: optimum(each) for width, each in losses.items()}
            home = home_of(own, losses)
            rows += [[variant, kind, *row] for row in width_rows(losses, optima, home)]
            verdicts.append([variant, kind, *verdict_row(own, losses, optima, home)])
    who, narrowest = ["optimizer", ""], min(widths_of(records))
    columns = ["width", "log2 best lr", "loss there", f"regret of the lr of {narrowest}"]
    summary = ["shift", "regret at most", "slope of ‖ΔW‖/‖W‖", "η λ steps", "wider is worse"]
    return "\n\n".join(
        [
            markdown([*who, *summary, "verdict on the lr"], verdicts),
            markdown([*who, *columns, "regret of the base's lr"], rows),
            "Shift: octaves from the narrowest to the widest. Regret at most: of the best lr of "
            "the base width (of the widest, if that did not run), at any other. Wider is worse: "
            "logged steps after warm-up, at that lr.",
        ]
    )


def home_of(records: list[Record], losses: dict[int, Losses]) -> int:
    """Return the width whose tuned rate the others use: the base width, else the widest one."""
    base = records[0]["base_width"]
    return base if base in losses else max(losses)


def width_rows(losses: dict[int, Losses], optima: dict[int, Optimum], home: int) -> list[list[str]]:
    """Return a row per width: its optimum, and the regrets of the rates of two other widths.

    These are the narrowest width and `home`.
    """
    rates = [tuned(losses[min(losses)]), tuned(losses[home])]
    return [
        [str(width), shown(optima[width]), f"{optima[width].loss:.4f}"]
        + [percent(regret(each, lr)) for lr in rates]
        for width, each in losses.items()
    ]


def percent(cost: float) -> str:
    """Format a regret; "unknown" if the rate did not run."""
    return "unknown" if math.isnan(cost) else f"{cost:.2%}"


def shown(best: Optimum) -> str:
    """Format log2 of the best rate, with a note if it does not come from a fit."""
    note = {"fit": "", "grid": " (no fit)", "edge": " (edge of the grid)"}[best.kind]
    return f"{best.log2_lr:.2f}{note}"


def verdict_row(
    records: list[Record], losses: dict[int, Losses], optima: dict[int, Optimum], home: int
) -> list[str]:
    """Return shift, regret, update ratio at the shared rate, steps with wider worse, verdict."""
    lr, settings = tuned(losses[home]), records[0]["settings"]
    moved, is_known = shift(optima), all(best.kind != "edge" for best in optima.values())
    cost = float(np.max([regret(each, lr) for each in losses.values()]))  # NaN if one is NaN
    at_lr = [record for record in records if record["lr"] == lr]
    ratio = slope(at_lr, lambda record: record.get("update_ratio"))
    worse, n = steps_where_wider_is_worse(records, lr, settings["warmup_steps"])
    octaves = math.log2(max(losses) / min(losses))
    has_sweep = max(map(len, losses.values())) > 1
    settled = lr * settings["weight_decay"] * steps_at_peak(settings)
    return [
        "unknown" if math.isnan(moved) else f"{moved:+.2f} over {max(losses) / min(losses):g}x",
        percent(cost),
        ratio_text(ratio, settings["wd_scaling"], settled, is_mup=settings["mup"]),
        f"{settled:.2g}",
        f"{worse}/{n}",
        judge(moved if is_known else math.nan, cost, octaves, is_mup=settings["mup"])
        if has_sweep
        else "one lr, no sweep",
    ]


def judge(moved: float, cost: float, octaves: float, *, is_mup: bool) -> str:
    """Judge whether the best rate is the same at all widths (muP) or drifts (the control).

    Args:
        moved: shift in octaves over all widths; NaN if an optimum is at the edge of its grid.
        cost: the largest regret of the shared rate; NaN if the rate did not run at some width.
        octaves: log2 of the widest over the narrowest width.
        is_mup: whether the runs use muP.
    """
    if octaves < MIN_OCTAVES:
        return f"open: less than {2**MIN_OCTAVES}x of width"
    if math.isnan(moved):
        return "open: an optimum is at the edge of the grid"
    if math.isnan(cost):
        return "open: the lr did not run at every width"
    if is_mup:
        return (
            "transfers" if abs(moved) <= MAX_SHIFT and cost <= MAX_REGRET else "DOES NOT TRANSFER"
        )
    drifts = abs(moved) >= MIN_SHIFT * octaves and cost >= MIN_REGRET
    return "drifts, as a control should" if drifts else "DOES NOT DRIFT"


def steps_at_peak(settings: dict[str, Any]) -> float:
    """Return the sum of the schedule's rates, in units of steps at the peak rate."""
    keys = ("schedule", "warmup_steps", "max_steps", "min_lr_ratio")
    schedule = {key: settings[key] for key in keys}
    return sum(lr_scale(step, **schedule) for step in range(settings["max_steps"]))


def ratio_text(ratio: Estimate, scaling: str, settled: float, *, is_mup: bool) -> str:
    """Format the slope, and say whether it fits the mode of weight decay."""
    text = f"{ratio.mean:+.2f}"
    if not is_mup or scaling not in RATIOS or settled < SETTLED:
        return text
    expected, tolerance = RATIOS[scaling]
    passes = abs(ratio.mean - expected) <= tolerance
    return text + (" (passes)" if passes else " (FAILS)")
