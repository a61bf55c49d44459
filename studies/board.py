"""Run the board: optimizers of the literature with DoPr and without, on four rollout tasks.

    python -m studies.board                 everything: days of a core; continues where it stopped
    python -m studies.board pdfa humanoid   the tasks whose names begin like this

A task is one command of studies.sweep.compare, with a folder of its own under --out. The protocol
is in docs/log/2026-11-29-board.md.
"""

import sys

from studies.humanoid.all_stages import STEPS as CLONE_STEPS
from studies.humanoid.all_stages import TASK as HUMANOID
from studies.rollout.all_stages import RolloutStage
from studies.stages import run_stages
from studies.sweep.variants import FAST_PREFIX

STEPS, SEEDS, TUNING_SEEDS = 500, 5, 2
FREE = "schedulefreeadamw+schedule=constant"  # what it is made for
BASES = (
    *("adamw", "sgd", "signum", "muon", "adamuon"),
    *("nadam", "adafactor"),  # of torch.optim; the others are pytorch_optimizer's
    *("lion", "adopt", "adabelief", "ademamix", "lamb", "adabound", "came", "soap", "kron"),
    *("mars+weight_decay_1d=0", "prodigy", FREE),  # MARS has a decay of its own for gains
)
VARIANTS = tuple(name for base in BASES for name in (base, FAST_PREFIX + base))
CHANGES = ("weight_decay=0",)  # it is coupled to the gradient in some classes and not in others
STAGES = (
    RolloutStage("humanoid", HUMANOID, CLONE_STEPS, VARIANTS, SEEDS, TUNING_SEEDS),
    *(
        RolloutStage(task, task, STEPS, VARIANTS, SEEDS, TUNING_SEEDS, CHANGES)
        for task in ("pdfa", "ctrl", "nav")
    ),
)


def main(argv: list[str]) -> None:
    run_stages(argv, STAGES, module="studies.board", about=__doc__, out="out/board")


if __name__ == "__main__":
    main(sys.argv[1:])
