"""One point of a width study: a run of train.py at one width, measured from its checkpoints."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.rollout.record import train_command
from eval.run import ENVIRONMENT
from studies.stats.analysis import Record
from studies.sweep.run_cache import recorded
from studies.sweep.training import model_settings, train_in
from studies.sweep.variants import Variant

PARAMETRISATIONS = {"sp": {"mup": False}, "mup": {"mup": True}}
RATES = {  # octave 0: near the best rate at width 256, the base
    "adamw": 2**-10,
    "signum": 2**-12,
    "sgd": 2**-6,
    "muon": 2**-7,
    "muon spectral": 2**-5,
    "muon original": 2**-5,
    "adamuon": 2**-7,
}
AUX_LR = 2**-9  # of the AdamW beside muon and adamuon, at every octave


@dataclass(frozen=True)
class WidthTrial:
    """One run. `measure` makes the numbers of its record from its folder, once it has finished."""

    folder: Path
    variant: Variant
    parametrisation: str  # sp | mup
    width: int
    octave: float  # log2 of the rate over RATES
    seed: int
    settings: dict[str, Any]  # of train.py, on top of config/width.py
    measure: Callable[[Path], dict[str, Any]]

    @property
    def lr(self) -> float:
        settings = dict(self.variant.settings)
        name = str(settings["optimizer"])
        scale = settings.get("adjust_lr", "match_rms_adamw")
        return RATES.get(f"{name} {scale}", RATES[name]) * 2**self.octave

    @property
    def command(self) -> list[str]:
        aux = {"aux_lr": AUX_LR} if self.variant.optimizer in ("muon", "adamuon") else {}
        changes = aux | self.settings | dict(self.variant.settings)
        changes |= PARAMETRISATIONS[self.parametrisation] | {"n_embd": self.width, "lr": self.lr}
        changes |= {"seed": self.seed, "out_dir": self.folder}
        return ["train.py", "config/width.py", *(f"--{k}={v}" for k, v in changes.items())]

    def asked(self) -> dict[str, Any]:
        """Every number that makes the record what it is. ConfigError if train.py would refuse."""
        return model_settings(self.command)


def run_width_trial(point: WidthTrial) -> None:
    """Leave the record of a point, and nothing of its checkpoints."""
    recorded(point.folder, point.asked(), lambda: _measured(point))
    shutil.rmtree(point.folder / "checkpoints", ignore_errors=True)


def _measured(point: WidthTrial) -> Record:
    has_finished = train_in(point.folder, point.command)
    settings = json.loads((point.folder / "config.json").read_text())
    started, *rows = map(json.loads, (point.folder / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if row["kind"] == "val"]
    return {
        "variant": point.variant.name,
        "base": point.variant.base,
        "parametrisation": point.parametrisation,
        "width": point.width,
        "base_width": settings["mup_base_width"],
        "lr": point.lr,
        "seed": point.seed,
        "steps": settings["max_steps"],
        "val_loss": losses[-1] if has_finished else None,
        "curve": [[row["step"], row["loss"]] for row in rows if row["kind"] == "train"],
        **(point.measure(point.folder) if has_finished else {}),
        "command": train_command(settings, started["threads"]),
        "environment": {key: started[key] for key in ENVIRONMENT},
        "settings": settings,
    }
