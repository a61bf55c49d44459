"""The optimizers and tasks of the board, and how they are compared."""

from studies.humanoid.all_stages import STEPS as CLONE_STEPS
from studies.humanoid.all_stages import TASK as HUMANOID
from studies.rollout.all_stages import RolloutStage
from studies.sweep.variants import FAST_PREFIX

STEPS, SEEDS, TUNING_SEEDS = 500, 5, 2
FREE = "schedulefreeadamw+schedule=constant"  # what it is made for
BASES = (
    *("adamw", "sgd", "signum", "muon", "adamuon"),
    *("nadam", "adafactor"),  # of torch.optim; the others are pytorch_optimizer's
    *("lion", "adopt", "adabelief", "ademamix", "lamb", "adabound", "came", "soap", "kron"),
    *("mars+weight_decay_1d=0", "prodigy", FREE),  # MARS has a decay of its own for gains
)
CHANGES = ("weight_decay=0",)  # it is coupled to the gradient in some classes and not in others
TASKS = {  # name: task with its knobs, steps of a run, settings of train.py
    **{name: (name, STEPS, CHANGES) for name in ("pdfa", "ctrl", "nav")},
    "humanoid": (HUMANOID, CLONE_STEPS, ()),
}


def stage(task: str, base: str) -> RolloutStage:
    """Return the comparison of an optimizer with DoPr and without, on a task."""
    spec, steps, changes = TASKS[task]
    pair = (base, FAST_PREFIX + base)
    return RolloutStage(f"{task}-{base}", spec, steps, pair, SEEDS, TUNING_SEEDS, changes)


STAGES = tuple(stage(task, base) for task in TASKS for base in BASES)
