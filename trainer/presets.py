"""Adjust or refuse settings that other settings make impossible or pointless.

`python train.py config/demo.py --max_steps=20` shortens the preset's warmup. Of two settings that
contradict each other in one source, neither is adjusted; `TrainConfig` refuses them. Settings that
have no effect, such as those of DoPr without DoPr, are refused if they were typed; those of a
preset are accepted.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from trainer.settings import FIELDS

DOPR_KEYS = (  # arguments of DoPr's preconditioner that have no effect with dopr=false
    *("gamma", "sigma_beta", "refresh_every", "collect_every", "token_stride", "exponent"),
    *("inverse", "trace_normalized", "fresh_mean", "block_diagonal", "embeddings", "statistics"),
)
LAYER_KEYS = ("include", "exclude")  # of DoPr, too
READERS = {  # a setting: our optimizers that read it; beside muon and adamuon, there is an AdamW
    **dict.fromkeys(("beta1", "beta2", "eps"), ("adamw", "muon", "adamuon")),
    "momentum": ("sgd", "signum", "muon", "adamuon"),
    **dict.fromkeys(("nesterov", "ns_coefficients", "ns_dtype"), ("muon", "adamuon")),
    "adjust_lr": ("muon",),
}
FP32_GAMMA = 1e-4  # the smallest damping for which DoPr needs no weights in float64
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


def moot_settings(values: dict[str, Any]) -> dict[str, str]:
    """Return the settings that have no effect because of others, each with the reason and a remedy.

    Args:
        values: all settings.
    """
    moot: dict[str, str] = {}
    if not values["dopr"]:
        moot |= dict.fromkeys((*DOPR_KEYS, *LAYER_KEYS), "without DoPr; add --dopr=true")
    if not values["ttf_every"]:
        moot["ttf_episodes"] = "without ttf_every; add --ttf_every=<steps>"
    if values["schedule"] == "constant":
        moot["min_lr_ratio"] = "on schedule=constant; remove it"
    if values["wandb"] == "off":
        moot["wandb_project"] = "without wandb; add --wandb=online"
    if not values["init_from"]:
        moot["allow_tokenizer_mismatch"] = "without init_from; remove it"
    name, remedy = values["optimizer"], "remove it, it is for {}"
    reader = name
    if not _is_ours(name):
        reader = "adamw" if _has_aux(values) else ""
        remedy = "write its arguments in --optimizer_args, by the names that the class gives them"
    unread = {key: readers for key, readers in READERS.items() if reader not in readers}
    return moot | {
        key: f"on optimizer={name}; {remedy.format(', '.join(readers))}"
        for key, readers in unread.items()
    }


def moot_problems(values: dict[str, Any], typed: set[str]) -> list[str]:
    """List typed settings that have no effect.

    Args:
        values: all settings.
        typed: the names of the settings that the command line gives.
    """
    return [
        f"{key}={values[key]}: has no effect {reason}"
        for key, reason in moot_settings(values).items()
        if key in typed
    ]


def damping_problems(values: dict[str, Any]) -> list[str]:
    """List a damping that is too small for float32."""
    if not (values["dopr"] and 0 <= values["gamma"] < FP32_GAMMA):
        return []  # optim.dopr.settings refuses a negative one
    return [
        f"gamma={values['gamma']:g}: must be at least {FP32_GAMMA:g}, because weights are float32 "
        "here, and rounding then changes M by up to a percent, or more if Σ is nearly singular; "
        "use a larger gamma, or the library (optim.ActivationPreconditioner) with float64 weights"
    ]


def _rules(v: dict[str, Any]) -> Iterator[tuple[str, bool, str, Any, str]]:
    """Yield (setting, whether it is moot, the setting that makes it so, new value, reason)."""
    steps, batch, micro = v["max_steps"], v["batch_size"], v["micro_batch_size"]
    is_too_long = v["schedule"] != "constant" and 0 < steps <= v["warmup_steps"]
    yield "warmup_steps", is_too_long, "max_steps", steps // 10, "is not longer than the warmup"
    reason = f"has no auxiliary AdamW; check lr={v['lr']}, too"
    yield "aux_lr", v["aux_lr"] is not None and not _has_aux(v), "optimizer", None, reason
    for key in ("optimizer_args", "optimizer_roles"):
        default = FIELDS[key].default
        is_moot = v[key] != default and _is_ours(v["optimizer"])
        yield key, is_moot, "optimizer", default, "has settings of its own"
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


def _is_ours(optimizer: str) -> bool:
    """Whether an optimizer has settings of its own."""
    return any(optimizer in readers for readers in READERS.values())


def _has_aux(v: dict[str, Any]) -> bool:
    """Whether an AdamW trains beside the optimizer. True if there is no such optimizer."""
    from optim.build import has_aux, third_party  # imports torch

    try:
        return has_aux(
            v["optimizer"],
            third_party(v["optimizer"], v["optimizer_args"], v["optimizer_roles"]),
        )
    except ValueError:  # optimizer_problems reports it
        return True
