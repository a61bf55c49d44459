"""Learning-rate schedules: a pure function from the step to a factor on all base rates."""

import difflib
import math

SCHEDULES = ("cosine", "wsd", "constant")
DECAY_FRACTION = 0.2  # fraction of max_steps over which wsd (warmup-stable-decay) decays


def lr_scale(
    step: int,
    *,
    schedule: str,
    warmup_steps: int,
    max_steps: int,
    min_lr_ratio: float,
) -> float:
    """Return the factor in [0, 1] on the peak learning rate at step number `step`.

    A run takes the steps 0, ..., max_steps - 1. With w = warmup_steps and s = max_steps:

        warmup    step < w    (step + 1) / (w + 1): 1/(w + 1) at step 0, which reaches 1 at step w
        cosine    step >= w   half a cosine from 1 at step w to min_lr_ratio at step s
        wsd       step >= w   1 up to step (1 - DECAY_FRACTION) s, or step w if that is later; then
                              linear to min_lr_ratio at step s
        constant  step >= w   1

    The decay ends at step s, one after the last step, so the factor of the last step is positive
    even if min_lr_ratio is 0. From step s on, cosine and wsd stay at min_lr_ratio.

    Raises:
        ValueError: if the schedule is unknown or a number is out of range.
    """
    _check(step, schedule, warmup_steps, max_steps, min_lr_ratio)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        progress = _progress(step, warmup_steps, max_steps)
        height = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_start = max(warmup_steps, (1 - DECAY_FRACTION) * max_steps)
        height = 1 - _progress(step, decay_start, max_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * height


def _progress(step: int, start: float, end: int) -> float:
    """Return the fraction of the way from `start` to `end` at `step`, clamped to [0, 1]."""
    return 1.0 if step >= end else max(0, step - start) / (end - start)


def _check(
    step: int, schedule: str, warmup_steps: int, max_steps: int, min_lr_ratio: float
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
