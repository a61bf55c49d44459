"""The learning-rate schedule: a pure function from the step to a factor on all base rates."""

import difflib
import math

SCHEDULES = ("cosine", "wsd", "constant")
DECAY_FRACTION = 0.2  # of max_steps: the linear decay at the end of warm-up, stable, decay (wsd)


def lr_scale(
    step: int,
    *,
    schedule: str,
    warmup_steps: int,
    max_steps: int,
    min_lr_ratio: float,
    decay_fraction: float = DECAY_FRACTION,
) -> float:
    """The factor, in (0, 1], by which step number `step` multiplies the peak learning rate.

    A run takes the steps 0 ... max_steps - 1. With w = warmup_steps and s = max_steps:

        warm-up   step < w    (step + 1) / (w + 1): 1/(w + 1) at step 0, and 1 at step w
        cosine    step >= w   from 1 at step w along half a cosine to min_lr_ratio at step s
        wsd       step >= w   1, then a straight line from 1 at (1 - decay_fraction) s, or at
                              step w if that is later, to min_lr_ratio at step s
        constant  step >= w   1

    Step s is the one after the last, so that the last step still moves where min_lr_ratio = 0.
    From step s on, cosine and wsd stay at min_lr_ratio.

    Raises:
        ValueError: an unknown schedule, or a number outside its range.
    """
    _check(step, schedule, warmup_steps, max_steps, min_lr_ratio, decay_fraction)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        progress = _progress(step, warmup_steps, max_steps)
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_start = max(warmup_steps, (1 - decay_fraction) * max_steps)
        height = 1 - _progress(step, decay_start, max_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * height


def _progress(step: int, start: float, end: int) -> float:
    """How far `step` is on the way from `start` to `end`, clamped to [0, 1]."""
    return 1.0 if step >= end else max(0, step - start) / (end - start)


def _check(
    step: int,
    schedule: str,
    warmup_steps: int,
    max_steps: int,
    min_lr_ratio: float,
    decay_fraction: float,
) -> None:
    if schedule not in SCHEDULES:
        close = difflib.get_close_matches(schedule, SCHEDULES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"schedule={schedule!r}: must be one of {', '.join(SCHEDULES)}{hint}")
    if step < 0:
        raise ValueError(f"step={step}: must be at least 0")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps}: must be at least 0")
    if schedule != "constant" and warmup_steps >= max_steps:
        raise ValueError(f"warmup_steps={warmup_steps}: must be below max_steps={max_steps}")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio={min_lr_ratio}: must be in [0, 1]")
    if not 0 < decay_fraction <= 1:
        raise ValueError(f"decay_fraction={decay_fraction}: must be in (0, 1]")
