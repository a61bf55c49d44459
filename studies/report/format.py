"""Format names and numbers for a page."""

import math
from collections.abc import Container

from eval.rollout.intervals import MIN_SEEDS, Estimate
from studies.stats.analysis import Compared
from studies.sweep.variants import FAST_PREFIX

Cell = tuple[str, str]  # a number, and "± 0.12" or empty
MINUS = "\u2212"
LARGEST = 700.0  # larger logarithms are cut off before they are exponentiated
NONE = "\u2013"  # shown where there is no number
IN_NATS = (
    *("val_ce", "val_kl", "accumulated_kl", "sequence_kl", "jeffreys", "overconfidence"),
    *("entropy_drift", "abs_entropy_drift"),
)
UNITS = dict.fromkeys(IN_NATS, "nats") | {"gap": "nats per step", "excess_percent": "%"}
WORDS = {"kl": "KL", "ce": "CE", "val": "validation", "percent": "", "abs": "absolute"}
MODES = {"": "base", "dopr-": "DoPr", FAST_PREFIX: "fast DoPr"}


def mode_of(variant: str, base: str) -> str:
    """Describe what a variant adds to its base: "base", "DoPr", "fast DoPr, gamma=0.01"."""
    prefix, _, changes = variant.partition(base)
    return MODES.get(prefix, prefix) + changes.replace("+", ", ")


def metric_label(name: str, error: str = "nats") -> str:
    """Return the name of a metric for readers, with its unit if it has one.

    error: the unit of the task's errors.
    """
    words = " ".join(WORDS.get(word, word) for word in name.split("_")).strip()
    return f"{words} ({UNITS[name].replace('nats', error)})" if name in UNITS else words


def error_unit(metrics: Container[str]) -> str:
    """Return the unit of rollout errors: nats, or squared action errors if models are policies."""
    return "squared action error" if "val_loss" in metrics else "nats"


def number(value: float, digits: int | None = None) -> str:
    """Format with `digits` decimals (default: four significant digits) and a true minus sign."""
    if not math.isfinite(value):
        return NONE
    if digits is not None:
        return f"{value:,.{digits}f}".replace("-", MINUS)
    if power := exponent(value):
        return f"{number(value / 10**power, 3)}{power_of_ten(power)}"
    return number(value, 3 - math.floor(math.log10(abs(value)))) if value else "0"


def exponent(size: float) -> int:
    """Return the power of ten to factor out of a number; 0 if it reads well without."""
    power = math.floor(math.log10(abs(size))) if size and math.isfinite(size) else 0
    return power if power < -3 or power > 5 else 0


def power_of_ten(power: int) -> str:
    return f"e{power}".replace("-", MINUS) if power else ""


def factor(log: float, least: int = 0) -> str:
    """Format e^log with three significant digits, or two far from one: 0.832, 144, 2.1e−7.

    least: the smallest number of decimals.
    """
    if math.isnan(log):
        return NONE
    value = math.exp(min(log, LARGEST))
    size = int(f"{value:.2e}".split("e")[1])
    if -4 < size < 4:
        return number(value, max(least, 2 - size))
    mantissa, power = f"{value:.1e}".split("e")
    return mantissa + power_of_ten(int(power))


def decimals(half: float) -> int | None:
    """Return the decimals that show two significant digits of half an interval.

    Returns None if the interval has no width.
    """
    if not (math.isfinite(half) and half > 0):
        return None
    return min(6, max(0, 1 - math.floor(math.log10(half))))


def signed(value: float, digits: int | None = None) -> str:
    return ("+" if value > 0 else "") + number(value, digits)


def pair(estimate: Estimate, *, sign: bool = False) -> Cell:
    """Format the mean and half of its interval ("± 0.12", or "") with equal decimals."""
    half, write = (estimate.hi - estimate.lo) / 2, signed if sign else number
    if decimals(half) is None:
        return write(estimate.mean), ""
    power = exponent(max(abs(estimate.mean), half))  # shared by both numbers
    mean, half, unit = estimate.mean / 10**power, half / 10**power, power_of_ten(power)
    digits = decimals(half)
    return write(mean, digits) + unit, f"± {number(half, digits)}{unit}"


def times(log: Estimate) -> Cell:
    """Format a difference of logarithms as a factor with its interval.

    An interval that excludes one has enough digits to show that: 0.9993 [0.999, 0.9997].
    """
    write = _beside_one if log.lo * log.hi > 0 else factor
    lo, mean, hi = map(write, (log.lo, log.mean, log.hi))
    if mean == NONE:
        return NONE, ""
    return f"× {mean}", "" if NONE in (lo, hi) else f"[{lo}, {hi}]"


def _beside_one(log: float) -> str:
    """Format e^log with enough digits to tell it from one."""
    return factor(log, min(6, -math.floor(math.log10(abs(log)))) if abs(log) < 0.005 else 0)


def p_value(p: float) -> str:
    """Format with two significant digits, however small: 0.53, 0.049, 0.00068, 6.8e−5."""
    if p >= 1e-4 or p == 0:
        return f"{p:.2f}" if p >= 0.1 else number(p, decimals(p))
    mantissa, power = f"{p:.1e}".split("e")
    return mantissa + power_of_ten(int(power))


def verdict(versus: Compared, at_this_rate: Compared | None = None) -> str:
    """Judge a comparison in which lower is better.

    Returns:
        "better" or "worse" if the interval excludes zero, else "unclear". "no pairs", "one seed" or
        "two seeds" if there are too few seeds. "diverged" if the variant diverged on more seeds
        than its base, because those seeds are not among the pairs. "by its rate" if the difference
        vanishes against the base at the variant's learning rate.
    """
    difference = versus.difference
    if versus.n_lost > versus.n_base_lost:
        return "diverged"
    if difference.n < MIN_SEEDS:
        return ("no pairs", "one seed", "two seeds")[difference.n]
    if not (difference.lo > 0 or difference.hi < 0):
        return "unclear"
    found = "better" if difference.mean < 0 else "worse"
    if at_this_rate is None or at_this_rate.difference.n < MIN_SEEDS:
        return found
    return found if verdict(at_this_rate) == found else "by its rate"
