"""Hold and check the settings of the preconditioner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from ..kernels.damped_root import Inverse
from ..kernels.dispatch import BACKENDS, Backend

Sharing = Literal["auto", "replicated", "sharded"]
STATISTICS = get_args(Sharing)
INVERSES = get_args(Inverse)
P_SETTINGS = ("gamma", "exponent", "trace_normalized", "fresh_mean")


@dataclass(frozen=True, kw_only=True)
class DoprSettings:
    """Hold the validated settings; ActivationPreconditioner documents their meaning.

    Raises:
        ValueError: if settings are out of range. The message lists all of them, one per line.
    """

    gamma: float
    sigma_beta: float | None
    refresh_every: int
    collect_every: int
    token_stride: int
    exponent: int
    inverse: Inverse
    trace_normalized: bool
    block_diagonal: int | None
    embeddings: bool
    fresh_mean: bool
    count_masked: bool
    statistics: Sharing
    backend: Backend

    def __post_init__(self) -> None:
        if problems := settings_problems(vars(self)):
            raise ValueError("\n".join(problems))
        for key, value in vars(self).items():
            object.__setattr__(self, key, _builtin_number(value))

    @property
    def p_settings(self) -> dict[str, Any]:
        """The settings that P depends on. If they change, P has to be recomputed from Σ."""
        return {key: getattr(self, key) for key in P_SETTINGS}


def settings_problems(settings: dict[str, Any]) -> list[str]:
    """List everything that is wrong with these settings, one line each.

    `count_masked`, `fresh_mean` and `statistics` may be absent.
    """
    rules = {
        key: rule
        for key, (is_valid, rule) in _RULES.items()
        if key in settings and not is_valid(settings[key])
    }
    problems = [f"{key}={_shown(settings[key])}: must be {rule}" for key, rule in rules.items()]
    if not {"refresh_every", "collect_every"} & rules.keys():
        collect_every, refresh_every = settings["collect_every"], settings["refresh_every"]
        if refresh_every % collect_every:
            problems.append(
                f"collect_every={collect_every}: must divide refresh_every={refresh_every}, "
                "so that every refresh has new statistics"
            )
    if settings.get("fresh_mean") is True and settings["exponent"] in (2, 4):
        problems.append(
            f"fresh_mean with exponent={settings['exponent']}: must be used with exponent=1, the "
            "only one whose correction has rank one"
        )
    if settings["embeddings"] is True and settings["gamma"] == 0:
        problems.append(
            "gamma=0 with embeddings: must be above 0, because some tokens may not occur"
        )
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _builtin_number(value: Any) -> Any:
    """Convert a number (of NumPy, say) to Python's int or float, which any checkpoint can hold."""
    if not _is_number(value):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _shown(value: Any) -> str:
    """Format a value for a message, with its type unless it is a number."""
    return f"{value}" if _is_number(value) else f"{value!r} ({type(value).__name__})"


_COUNT = (_is_count, "an integer >= 1")
_BOOL = (lambda value: isinstance(value, bool), "True or False")
_RULES = {  # key: (whether a value is valid, the rule as text)
    "gamma": (lambda value: _is_number(value) and 0 <= value < math.inf, "a finite number >= 0"),
    "sigma_beta": (
        lambda value: value is None or (_is_number(value) and 0 <= value < 1),
        "a number in [0, 1), or None for no average",
    ),
    **dict.fromkeys(("refresh_every", "collect_every", "token_stride"), _COUNT),
    "exponent": (lambda value: _is_count(value) and value in (1, 2, 4), "1, 2 or 4"),
    "inverse": (lambda value: value in INVERSES, f"one of {', '.join(INVERSES)}"),
    "block_diagonal": (
        lambda value: value is None or _is_count(value),
        "an integer >= 1, or None for a single block",
    ),
    **dict.fromkeys(("trace_normalized", "embeddings", "fresh_mean", "count_masked"), _BOOL),
    "statistics": (lambda value: value in STATISTICS, f"one of {', '.join(STATISTICS)}"),
    "backend": (lambda value: value in BACKENDS, f"one of {', '.join(BACKENDS)}"),
}
