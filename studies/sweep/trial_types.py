"""Choose how models are trained for a task: by train.py, or in a small program of their own."""

from eval.rollout.tasks.lds import Lds
from eval.rollout.tasks.task import TaskBase
from studies.humanoid.task import Humanoid
from studies.humanoid.trial import HumanoidTrial
from studies.sweep.lds import LdsTrial
from studies.sweep.trial import TrainTrial

TrialType = type[TrainTrial] | type[LdsTrial] | type[HumanoidTrial]
OTHER_TYPES: dict[type[TaskBase], TrialType] = {Lds: LdsTrial, Humanoid: HumanoidTrial}


def trial_type(task: TaskBase) -> TrialType:
    """Return the kind of trial that trains models for a task."""
    return OTHER_TYPES.get(type(task), TrainTrial)
