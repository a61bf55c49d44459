"""Run the width studies of docs/log: two hours of a CPU core; continues where it was stopped.

    python -m studies.mup.all_stages                   everything
    python -m studies.mup.all_stages transfer          the stages whose names begin like this

A stage is one command of studies.mup.coord_check or studies.mup.width_sweep, on the bytes of
Python's standard library. Stages with the same folder add to each other.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import data.pystdlib.prepare
from studies.mup import coord_check, width_sweep
from studies.stages import run_stages

MUON = ("muon", "muon+adjust_lr=unit_rms_norm", "muon+adjust_lr=original", "adamuon")
BASES = ("adamw", "signum", "sgd", *MUON)
RAW = "dopr-sgd+trace_normalized=false"
DECAYED = (  # with each mode of weight decay
    *("adamw+wd_scaling=independent", "adamw+wd_scaling=constant"),
    *("fast-dopr-adamw+wd_scaling=independent", "fast-dopr-adamw+wd_scaling=constant"),
)
DECAY = 9.0  # at rate 2^-9, η λ summed over 200 steps is 3.5: updates have settled


@dataclass(frozen=True)
class WidthStage:
    """One command. The folder is under --out; `settings` are settings of train.py."""

    name: str
    command: ModuleType
    folder: str
    optimizers: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def argv(self, out: Path, workers: int) -> list[str]:
        words = ["--optimizers", ",".join(self.optimizers), *self.arguments]
        words += ["--seeds", "0,1,2", "--workers", str(workers), "--out", str(out / self.folder)]
        return [*words, "--set", f"dataset={out / 'bytes'}", *self.settings]


def transfer(optimizer: str, lowest: int = -2) -> tuple[WidthStage, WidthStage]:
    """Return a sweep of five rates under muP, and of six higher rates under sp.

    The best rate should drift to higher ones under sp.
    """
    steps, narrow = ("--steps", "100"), ("--widths", "32,64,128")
    mup = ("--parametrisations", "mup", f"--octaves={lowest}:{lowest + 4}", *steps)
    sp = ("--parametrisations", "sp", f"--octaves={lowest + 1}:{lowest + 6}", *narrow, *steps)
    return (
        WidthStage(f"transfer-{optimizer}-mup", width_sweep, "transfer", (optimizer,), mup),
        WidthStage(f"transfer-{optimizer}-sp", width_sweep, "transfer", (optimizer,), sp),
    )


STAGES = (
    WidthStage(
        "coordinates", coord_check, "coordinates", (*BASES, *(f"dopr-{each}" for each in BASES))
    ),
    *transfer("dopr-adamw", lowest=-1),
    *transfer("dopr-muon"),
    WidthStage(
        *("decay", width_sweep, "decay", DECAYED),
        ("--parametrisations", "mup", "--octaves=1", "--steps", "200"),
        (f"weight_decay={DECAY}", "schedule=constant"),
    ),
    WidthStage(
        *("wide-coordinates", coord_check, "wide-coordinates"),
        ("adamw", "dopr-adamw", "dopr-muon"),
        ("--widths", "128,256,512"),
    ),
    WidthStage("untied", coord_check, "untied", ("adamw", "dopr-muon"), (), ("tie_weights=false",)),
    WidthStage("raw", coord_check, "raw", (RAW,), ("--octaves=-4",)),
    *transfer("adamw"),
    *transfer("muon"),
)


def prepare(out: Path) -> None:
    """Prepare the data of all stages unless the folder contains them."""
    if not (out / "bytes/meta.json").exists():
        data.pystdlib.prepare.main(["--tokenizer", "byte", "--out", str(out / "bytes")])


def main(argv: list[str]) -> None:
    names = {"module": "studies.mup.all_stages", "about": __doc__, "out": "out/width"}
    run_stages(argv, STAGES, prepare=prepare, **names)


if __name__ == "__main__":
    main(sys.argv[1:])
