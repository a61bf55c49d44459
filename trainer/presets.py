"""Adjust a setting of an earlier source that a later source makes impossible or pointless.

`python train.py config/demo.py --max_steps=20` shortens the preset's warmup. Of two settings that
contradict each other in one source, neither is adjusted; `TrainConfig` refuses them.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from trainer.settings import FIELDS

Adjustment = tuple[str, Any, str]  # a setting's name, its new value, and the reason


def adjustments(values: dict[str, Any], rank: Callable[[str], int]) -> Iterator[Adjustment]:
    """Yield what to change.

    Args:
        values: all settings.
        rank: returns the number of a setting's source; a higher number overrides a lower one.
    """
    for key, is_moot, cause, new, reason in _rules(values):
        if is_moot and rank(key) < rank(cause):
            yield key, new, f"{cause}={values[cause]} {reason}"


def _rules(v: dict[str, Any]) -> Iterator[tuple[str, bool, str, Any, str]]:
    """Yield (setting, whether it is moot, the setting that makes it so, new value, reason)."""
    steps, batch, micro = v["max_steps"], v["batch_size"], v["micro_batch_size"]
    is_too_long = v["schedule"] != "constant" and v["warmup_steps"] >= steps
    yield "warmup_steps", is_too_long, "max_steps", steps // 10, "is not longer than the warmup"
    has_aux = v["optimizer"] in ("muon", "adamuon")
    reason = f"has no auxiliary AdamW; check lr={v['lr']}, too"
    yield "aux_lr", v["aux_lr"] is not None and not has_aux, "optimizer", None, reason
    for key in ("mup_base_head_dim", "wd_scaling"):
        default = FIELDS[key].default
        yield key, v[key] != default and not v["mup"], "mup", default, "makes it pointless"
    is_unused = v["shard_size"] is not None and v["parallel"] != "hsdp"
    yield "shard_size", is_unused, "parallel", None, "has no shards of a given size"
    if batch >= 1 and micro >= 1 and batch % micro:
        size = next(n for n in range(min(batch, micro), 0, -1) if batch % n == 0)
        yield "micro_batch_size", True, "batch_size", size, "is not a multiple of it"
    every, collect = v["refresh_every"], v["collect_every"]
    if every >= 1 and collect >= 1 and every % collect:
        new = math.gcd(every, collect)
        yield "collect_every", True, "refresh_every", new, "is not a multiple of it"
