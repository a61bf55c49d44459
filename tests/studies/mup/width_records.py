"""Make records of width studies whose optima and slopes are known."""

import math
from typing import Any

from studies.mup.coordinates import KINDS, STEPS
from trainer.settings import TrainConfig

WIDTHS = (32, 64, 128, 256)
TINY = ["n_layer=1", "n_head=2", "block_size=16", "batch_size=4", "micro_batch_size=4"]
OCTAVES = range(-14, -5)  # log2 of the rates


def record(width: int, lr: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Return a record of adamw under muP, unless its settings say mup=False."""
    settings = {"warmup_steps": 10, "max_steps": 100, "weight_decay": 0.1, "mup": True}
    settings |= {"wd_scaling": "independent", "mup_base_width": 256} | changes.pop("settings", {})
    return {
        "variant": "adamw",
        "base": "adamw",
        "parametrisation": "mup" if settings["mup"] else "sp",
        "width": width,
        "base_width": 256,
        "lr": lr,
        "seed": seed,
        "steps": settings["max_steps"],
        "val_loss": 3.0,
        "curve": [],
        "settings": vars(TrainConfig()) | settings,
        **changes,
    }


def sweep(drift: float, *, seeds: int = 2, bowl: float = 0.05, **changes: Any) -> list[dict]:
    """Return runs whose losses are 3 + bowl (log2 lr - best)².

    The best rate is 2^-10 at width 256, and moves by `drift` octaves per doubling of the width.
    """
    return [
        record(width, 2.0**octave, seed, val_loss=3 + bowl * (octave - best) ** 2, **changes)
        for width in WIDTHS
        for best in [-10 + drift * math.log2(width / 256)]
        for octave in OCTAVES
        for seed in range(seeds)
    ]


def sized(exponents: dict[tuple[str, int], float], **changes: Any) -> list[dict]:
    """Return coordinate checks in which the RMS of a kind at t is width^exponent, 0 by default."""
    return [
        record(width, 2.0**-10, seed, **changes)
        | {
            "coordinates": {
                kind: {str(t): width ** exponents.get((kind, t), 0.0) for t in STEPS}
                for kind in (*KINDS, "logits")
            },
            "ap": {"attn.c_attn": width**-0.5},
        }
        for width in WIDTHS
        for seed in range(3)
    ]
