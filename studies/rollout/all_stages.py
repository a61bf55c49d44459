"""Run the rollout study of docs/log: hours of CPU time; continues where it was stopped.

    python -m studies.rollout.all_stages                 everything, then the pages
    python -m studies.rollout.all_stages ctrl-500 lds    the stages whose names begin like this

A stage is one command of studies.sweep.compare, with a folder of its own under --out. The planned
comparisons and the ablations each have a page and form a family: a star marks p below 0.05 / the
number of comparisons in the family.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from studies.humanoid.task import Humanoid
from studies.report import __main__ as report
from studies.stages import run_stages
from studies.stats.records import RECORDS, stored
from studies.sweep import compare
from studies.sweep.variants import FAST_PREFIX, parse_variant

BASES = ("adamw", "muon", "signum", "adamuon", "sgd")
LONG = ("adamw", "muon")
CHANGES = (  # to the exact mode of DoPr, one at a time
    *("gamma=0.01", "gamma=1", "sigma_beta=0.95", "refresh_every=10", "exponent=2"),
    *("include=*.attn.*", "include=*.mlp.*"),
)
EPISODES = {
    **{"pdfa": 512, "ctrl": 1024, "nav": 1024, "lds": 1},
    Humanoid.name: Humanoid.default_episodes,
}


@dataclass(frozen=True)
class RolloutStage:
    """One command of studies.sweep.compare; the folder has the name of the stage."""

    name: str
    task: str
    steps: int
    optimizers: tuple[str, ...]
    seeds: int = 8
    tuning_seeds: int = 2
    changes: tuple[str, ...] = ()  # settings of train.py for all optimizers, key=value
    episodes: int | None = None  # graded in each run; None means EPISODES

    @property
    def command(self) -> ModuleType:
        return compare

    def argv(self, out: Path, workers: int) -> list[str]:
        words = ["--task", self.task, "--steps", self.steps, "--seeds", self.seeds]
        words += ["--optimizers", ",".join(self.optimizers), "--workers", workers]
        words += ["--tuning_seeds", self.tuning_seeds]
        words += ["--set", *self.changes] if self.changes else []
        episodes = self.episodes or EPISODES[self.task.split(",")[0]]
        words += ["--episodes", episodes, "--out", out / self.name]
        return list(map(str, words))


def modes(bases: tuple[str, ...], changes: str = "") -> tuple[str, ...]:
    """Return each base, alone and with both modes of DoPr; `changes` apply to DoPr."""
    with_dopr = (f"dopr-{{}}{changes}", f"{FAST_PREFIX}{{}}{changes}")
    return tuple(name.format(base) for base in bases for name in ("{}", *with_dopr))


def exact(bases: tuple[str, ...]) -> tuple[str, ...]:
    """Return the exact mode of each base."""
    return tuple(f"dopr-{base}" for base in bases)


def ablations(bases: tuple[str, ...]) -> tuple[str, ...]:
    """Return each base, its exact mode, and the exact mode with each of CHANGES."""
    changed = (f"{name}+{change}" for name in exact(bases) for change in CHANGES)
    return (*(prefix + base for base in bases for prefix in ("", "dopr-")), *changed)


SMALL = "+gamma=0.001"  # on `lds`, does not suppress the hidden directions
STAGES = (
    *(RolloutStage(f"{task}-500", task, 500, modes(BASES)) for task in ("pdfa", "ctrl", "nav")),
    RolloutStage("lds-200", "lds", 200, modes(BASES, SMALL) + exact(BASES)),
    RolloutStage("lds-600", "lds", 600, modes(LONG, SMALL) + exact(LONG)),
    *(
        RolloutStage(f"lds-200-excitation-{x}", f"lds,excitation={x}", 200, modes(LONG, SMALL))
        for x in ("1e-2", "1")
    ),
    *(RolloutStage(f"{task}-1500", task, 1500, modes(LONG)) for task in ("pdfa", "ctrl", "nav")),
)
ABLATIONS = tuple(
    RolloutStage(f"ablations-{task}-500", task, 500, ablations(LONG), seeds=5)
    for task in ("pdfa", "ctrl")
)


def planned(stages: tuple[RolloutStage, ...]) -> int:
    """Count the comparisons of an optimizer with its base: the family that the protocol fixes."""
    names = [name for stage in stages for name in stage.optimizers]
    return sum(parse_variant(name).base != name for name in names)


def write_page(stages: tuple[RolloutStage, ...], out: Path, page: str) -> None:
    """Write a report of the stages that have records; stars use the comparisons of all stages."""
    found = (out / each.name for each in stages)
    folders = [str(folder) for folder in found if stored(folder / RECORDS)]
    if folders:
        report.main([*folders, "--out", str(out / page), "--comparisons", str(planned(stages))])


def main(argv: list[str]) -> None:
    names = {"module": "studies.rollout.all_stages", "about": __doc__, "out": "out/study"}
    out = run_stages(argv, STAGES + ABLATIONS, **names)
    write_page(STAGES, out, "page")
    write_page(ABLATIONS, out, "page-ablations")


if __name__ == "__main__":
    main(sys.argv[1:])
