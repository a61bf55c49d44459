"""List the tasks of the studies, with the kind of trial that trains models for each.

train.py trains on the tasks of eval.rollout.tasks. The models of the other tasks are policies
without tokens, which a trial of their own trains. A study treats all tasks alike.
"""

from eval.rollout.tasks import TASKS
from eval.rollout.tasks.lds import Lds
from eval.rollout.tasks.task import TaskBase
from studies.humanoid.task import Humanoid
from studies.humanoid.trial import HumanoidTrial
from studies.sweep.lds import LdsTrial
from studies.sweep.policy_trial import PolicyTrial
from studies.sweep.trial import TrainTrial

TrialType = type[TrainTrial] | type[PolicyTrial]
TRIALS: dict[type[TaskBase], TrialType] = {
    **dict.fromkeys(TASKS.values(), TrainTrial),
    Lds: LdsTrial,
    Humanoid: HumanoidTrial,
}
STUDY_TASKS: dict[str, type[TaskBase]] = {task.name: task for task in TRIALS}


def trial_type(task: TaskBase) -> TrialType:
    """Return the kind of trial that trains models for a task.

    Raises KeyError, with what to do, if the class of the task is not listed here.
    """
    if type(task) not in TRIALS:
        raise KeyError(f"{type(task).__name__} is not a task of the studies: add it to {__file__}")
    return TRIALS[type(task)]
