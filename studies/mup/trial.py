"""Make one run of a width study: run train.py at one width, and measure its checkpoints."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.rollout.record import train_command
from eval.run import ENVIRONMENT
from studies.stats.records import Record
from studies.sweep.run_cache import read_settings, recorded
from studies.sweep.trial import model_settings, train_in
from studies.sweep.variants import Variant

PARAMETRISATIONS = {"sp": {"mup": False}, "mup": {"mup": True}}
RATES = {  # learning rate of octave 0, near the best one at width 256, the base width
    "adamw": 2**-10,
    "signum": 2**-12,
    "sgd": 2**-6,
    "muon": 2**-7,
    "muon unit_rms_norm": 2**-5,
    "muon original": 2**-5,
    "adamuon": 2**-7,
}
AUX_LR = 2**-9  # of the AdamW beside muon and adamuon, at every octave


@dataclass(frozen=True)
class WidthTrial:
    """One run. `measure` returns further fields of the record from the folder of a finished run."""

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
        """The learning rate. Raises ValueError if the optimizer has none in RATES."""
        name = self.variant.optimizer
        scale = (self.settings | dict(self.variant.settings)).get("adjust_lr")
        rate = RATES.get(f"{name} {scale}", RATES.get(name))
        if rate is None:
            raise ValueError(
                f"optimizer {name} has no rate here; add one to RATES in studies/mup/trial.py"
            )
        return rate * 2**self.octave

    @property
    def command(self) -> list[str]:
        aux = {"aux_lr": AUX_LR} if self.variant.optimizer in ("muon", "adamuon") else {}
        changes = aux | self.settings | dict(self.variant.settings)
        changes |= PARAMETRISATIONS[self.parametrisation] | {"n_embd": self.width, "lr": self.lr}
        changes |= {"seed": self.seed, "out_dir": self.folder}
        return ["train.py", "config/width.py", *(f"--{k}={v}" for k, v in changes.items())]

    def asked(self) -> dict[str, Any]:
        """Return every setting that determines the record. Raises ConfigError if one is invalid."""
        return model_settings(self.command)


def run_width_trial(trial: WidthTrial) -> None:
    """Write the record of a trial and delete its checkpoints."""
    recorded(trial.folder, trial.asked(), lambda: _train_and_measure(trial))
    shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)


def _train_and_measure(trial: WidthTrial) -> Record:
    has_finished = train_in(trial.folder, trial.command)
    settings = read_settings(trial.folder)
    started, *rows = map(json.loads, (trial.folder / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if row["kind"] == "val"]
    return {
        "variant": trial.variant.name,
        "base": trial.variant.base,
        "parametrisation": trial.parametrisation,
        "width": trial.width,
        "base_width": settings["mup_base_width"],
        "lr": trial.lr,
        "seed": trial.seed,
        "steps": settings["max_steps"],
        "val_loss": losses[-1] if has_finished else None,
        "curve": [[row["step"], row["loss"]] for row in rows if row["kind"] == "train"],
        **(trial.measure(trial.folder) if has_finished else {}),
        "command": train_command(settings, started["threads"]),
        "environment": {key: started[key] for key in ENVIRONMENT},
        "settings": settings,
    }
