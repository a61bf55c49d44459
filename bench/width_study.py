"""The width studies of LOG.md: hours of CPU, continue where they were stopped.

    python -m bench.width_study                   everything
    python -m bench.width_study coordinates       the stages whose names begin like this

A stage is one command of eval.coord_check or eval.width_sweep, in a folder of its own under --out,
on the bytes of the interpreter's own library.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import data.pystdlib.prepare
from bench.rollout_study import chosen
from eval import coord_check, width_sweep

MATRIX = ("muon", "muon+muon_scale=spectral", "muon+muon_scale=original", "adamuon")
BASES = ("adamw", "signum", "sgd", *MATRIX)
RAW = "dopr-sgd+trace_normalized=false"
MODES = ("independent", "constant")  # of weight decay
DECAY = 6.0  # at rate 2^-10, η λ steps is 3.5 after 600: updates have settled


@dataclass(frozen=True)
class Stage:
    """One command; its name is that of its folder."""

    name: str
    command: ModuleType
    optimizers: tuple[str, ...]
    arguments: tuple[str, ...]
    settings: tuple[str, ...] = ()  # of train.py

    def argv(self, out: Path, workers: int) -> list[str]:
        words = ["--optimizers", ",".join(self.optimizers), *self.arguments]
        words += ["--seeds", "0,1,2", "--workers", str(workers), "--out", str(out / self.name)]
        return [*words, "--set", f"dataset={out / 'bytes'}", *self.settings]


STAGES = (
    Stage("coordinates", coord_check, (*BASES, *(f"dopr-{each}" for each in BASES)), ()),
    Stage("coordinates-untied", coord_check, ("adamw", "dopr-muon"), (), ("tie_weights=false",)),
    Stage("coordinates-raw", coord_check, (RAW,), ("--octaves=-4",)),
    Stage("transfer-dopr-adamw", width_sweep, ("dopr-adamw",), ("--octaves=-3:5",)),
    Stage("transfer-dopr-muon", width_sweep, ("dopr-muon",), ("--octaves=-4:4",)),
    Stage("transfer-adamw", width_sweep, ("adamw",), ("--octaves=-3:4",)),
    Stage("transfer-muon", width_sweep, ("muon",), ("--octaves=-4:4",)),
    Stage(
        "decay",
        width_sweep,
        tuple(f"{name}+wd_scaling={mode}" for name in ("adamw", "dopr-adamw") for mode in MODES),
        ("--parametrisations", "mup", "--octaves=0", "--steps", "600"),
        (f"weight_decay={DECAY}", "schedule=constant"),
    ),
)


def prepare(folder: Path) -> None:
    """The data, if they are not there."""
    if not (folder / "meta.json").exists():
        data.pystdlib.prepare.main(["--tokenizer", "byte", "--out", str(folder)])


def main(argv: list[str]) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench.width_study", None, __doc__, formatter_class=formatter)
    parser.add_argument("stages", nargs="*", help="; ".join(stage.name for stage in STAGES))
    parser.add_argument("--out", type=Path, default=Path("out/width"))
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    arguments = parser.parse_args(argv)
    if not (stages := chosen(STAGES, arguments.stages)):
        parser.error(f"no stage begins with {', '.join(arguments.stages)}")
    prepare(arguments.out / "bytes")
    for stage in stages:
        words = stage.argv(arguments.out, arguments.workers)
        print(shlex.join(["python", "-m", stage.command.__name__, *words]), flush=True)
        stage.command.main(words)


if __name__ == "__main__":
    main(sys.argv[1:])
