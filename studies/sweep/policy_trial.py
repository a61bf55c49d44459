"""The part of a trial that tasks share whose models are policies, trained without train.py."""

from collections.abc import Iterable
from typing import Any, ClassVar

from studies.sweep.trial import Trial, model_settings


class PolicyTrial(Trial):
    """A policy that is trained and graded in this process. Subclasses train and grade it."""

    task_name: ClassVar[str]

    @classmethod
    def parse_changes(cls, pairs: Iterable[str]) -> dict[str, str]:
        """Raise ValueError if --set is given: the settings of train.py do not apply."""
        if list(pairs):
            raise ValueError(
                f"--set: task {cls.task_name} has no such settings; see `optimizer+gamma=0.1`"
            )
        return {}

    @staticmethod
    def sizes(task: Any, steps: int, tokens_per_step: int) -> dict[str, Any]:
        return {}

    def model_identity(self) -> dict[str, Any]:
        model_settings([*self.command, "--warmup_steps=0"])  # check the values
        return {**self.settings, "lr": self.lr, "seed": self.seed, "spec": self.task.spec}
