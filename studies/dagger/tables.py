"""Format the means, the effects of DAgger and of DoPr, and their interaction as tables.

Effects are differences of two combinations and the interaction is the difference of two effects,
each within a seed. Intervals are over seeds.
"""

from dataclasses import dataclass

import numpy as np

from eval.tables import markdown
from studies.dagger.comparison import METRICS, Setup, key_of
from studies.humanoid.tables import with_half
from studies.rows import Row
from studies.stats.seeds import over_seeds

# On `pdfa` also the KL on own rollouts, which DAgger minimizes. It is not defined on the others,
# whose episodes can end.
EFFECTS_ON = {task: names[:1] for task, names in METRICS.items()} | {"pdfa": METRICS["pdfa"][:2]}
GAINS = ("DAgger", "DoPr")
Values = dict[Setup, np.ndarray]  # (seeds,) of one metric


@dataclass(frozen=True)
class Effects:
    """The effects at one combination, (seeds,) each; empty where a combination has not run."""

    dagger: np.ndarray  # minus cloning with the same optimizer
    dopr: np.ndarray  # minus the base optimizer with the same method
    interaction: np.ndarray  # effect of DoPr with DAgger, minus that with cloning


def effects(values: Values, setup: Setup) -> Effects:
    """Return the effects at a combination, which has to be among the values."""

    def minus(a: Setup, b: Setup) -> np.ndarray:
        return values[a] - values[b] if a != b and {a, b} <= values.keys() else np.empty(0)

    dagger, dopr = minus(setup, setup.cloning), minus(setup, setup.base)
    before = minus(setup.cloning, setup.base.cloning)
    has_all = len(dagger) and len(dopr) and len(before)
    return Effects(dagger, dopr, dopr - before if has_all else np.empty(0))


def verdict(errors: Values, setup: Setup) -> str:
    """Apply the protocol's rule to the four log errors, of which `setup` is DoPr with DAgger."""

    def lowers(effect: np.ndarray) -> bool:
        return over_seeds(effect.tolist()).hi < 0

    both = effects(errors, setup)
    alone = effects(errors, setup.base).dagger, effects(errors, setup.cloning).dopr
    if missing := [name for name, effect in zip(GAINS, alone, strict=True) if not lowers(effect)]:
        return f"no gain of {' or '.join(missing)} alone"
    is_less = over_seeds(both.interaction.tolist()).lo > 0
    lost = [not lowers(both.dagger), not lowers(both.dopr)]
    if not any(lost):
        return "adds up in part" if is_less else "adds up"
    replaced = " and ".join(name for name, is_lost in zip(GAINS, lost, strict=True) if is_lost)
    return f"{replaced} replaced" if is_less else "undecided"


def means_of(rows: list[Row], name: str) -> str:
    """Return the means of a task's rows, and the effects on a metric."""
    values = {key_of(row): np.array(row[name]) for row in rows}
    cells = []
    for setup, row in zip(values, rows, strict=True):
        found = effects(values, setup)
        shown = (found.dagger, found.dopr, found.interaction)
        differences = (with_half(over_seeds(each.tolist()), "+.3f") for each in shown)
        means = (with_half(over_seeds(row[key]), ".3f") for key in ("val_loss", name))
        cells.append((*labels(row), *means, *differences))
    header = ("optimizer", "", "lr", "val loss", name, "minus cloning", "minus base", "interaction")
    return markdown(header, cells)


def ratios_of(rows: list[Row], name: str) -> str:
    """Return the effects on the logarithm of an error as ratios, and the verdicts.

    The error is that of the benchmark for the metric that ranks, and the metric itself for others.
    """
    is_ranked = name == METRICS[rows[0]["task"]][0]
    errors = {
        key_of(row): np.array(row["log_error"]) if is_ranked else np.log(row[name]) for row in rows
    }
    cells = []
    for setup, row in zip(errors, rows, strict=True):
        found = effects(errors, setup)
        shown = map(ratio, (found.dagger, found.dopr, found.interaction))
        is_known = len(found.interaction) and np.isfinite(found.interaction).all()
        last = verdict(errors, setup) if is_known else ""
        cells.append((*labels(row), *shown, last))
    header = ("optimizer", "", "lr", "error / cloning's", "error / base's", "interaction", "")
    return markdown(header, cells)


def labels(row: Row) -> tuple[str, ...]:
    return f"`{row['variant']}`", row["method"], f"{row['lr']:g}"


def ratio(log_ratios: np.ndarray) -> str:
    """Format the geometric mean of ratios with its interval; "" without values."""
    found = over_seeds(log_ratios.tolist())
    mean, lo, hi = np.exp([found.mean, found.lo, found.hi])
    return f"{mean:.2f} [{lo:.2f}, {hi:.2f}]" if found.n else ""


def tables_of(rows: list[Row]) -> str:
    """Return both tables for every task and metric in EFFECTS_ON."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        for name in EFFECTS_ON[task]:
            parts += [f"{task}: {name}", means_of(own, name), ratios_of(own, name)]
    return "\n\n".join(parts)
