"""Train policies without tokens for a study, in this process and without train.py.

A subclass of `PolicyTrial` is a command, too, which repeats one run of a comparison.
"""

import shlex
from abc import abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from eval.command import at_least, command_parser, reported_errors
from eval.rollout.metrics import Grade
from eval.rollout.record import make_record
from eval.rollout.tasks import parse_task
from eval.rollout.tasks.task import TaskBase
from eval.rollout.ttf import grading_version
from studies.sweep.optimizers import default_settings
from studies.sweep.trial import Trial, model_settings
from studies.sweep.variants import FIXED, Variant, parse_variant
from trainer.provenance import provenance


class PolicyTrial(Trial):
    """A policy that is trained and graded in this process. Subclasses train and grade it."""

    module: ClassVar[str]  # `python -m MODULE` repeats a run
    task_type: ClassVar[type[TaskBase]]
    default_steps: ClassVar[int]  # of the command that repeats a run
    dopr_settings: ClassVar[set[str]]  # that the name of a variant can change
    other_settings: ClassVar[set[str]] = set()

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """The number of states in a step of training."""

    @abstractmethod
    def train_and_grade(self) -> Grade | None:
        """Train the policy and return its grade; None if training diverged."""

    @classmethod
    def parse_variant(cls, name: str) -> Variant:
        """Return the variant with that name.

        Raises ValueError if it changes a setting that the task does not have.
        """
        variant = parse_variant(name)
        settings = dict(variant.settings)
        can_change = cls.other_settings | (cls.dopr_settings if settings["dopr"] else set())
        if unknown := sorted(settings.keys() - can_change - {*FIXED}):
            others = ", ".join(sorted(cls.other_settings))
            raise ValueError(
                f"optimizer {name!r}: task {cls.task_type.name} has no setting "
                f"{', '.join(unknown)} here; only {', '.join(sorted(cls.dopr_settings))} of DoPr "
                f"can be changed" + (f", and {others}" if others else "")
            )
        return variant

    @classmethod
    def parse_changes(cls, pairs: Iterable[str]) -> dict[str, str]:
        """Raise ValueError if --set is given: the settings of train.py do not apply."""
        if list(pairs):
            raise ValueError(
                f"--set: task {cls.task_type.name} has no such settings; see `optimizer+gamma=0.1`"
            )
        return {}

    @staticmethod
    def sizes(task: Any, steps: int, tokens_per_step: int) -> dict[str, Any]:
        return {}

    def model_identity(self) -> dict[str, Any]:
        model_settings([*self.command, "--warmup_steps=0"])  # check the values
        defaults = default_settings(self.settings["optimizer"], self.settings["dopr"])
        run = {"lr": self.lr, "seed": self.seed, "spec": self.task.spec}
        return defaults | self.settings | run

    def make(self) -> dict[str, Any]:
        grade = self.train_and_grade()
        sizes = {"batch_size": self.batch_size, "block_size": 1}
        code = grading_version(self.task)
        return make_record(
            self.task,
            self.settings | {"lr": self.lr, "seed": self.seed} | sizes,
            steps=self.settings["max_steps"],
            val_loss=grade and grade.metrics["val_loss"].mean,
            grade=grade and grade.to_json(),
            grading={"n": self.n, "seed": self.grading_seed, "code": code},
            command=self.repeat_command,
            environment=provenance(torch.device("cpu")),
        )

    @property
    def repeat_command(self) -> str:
        """The command that repeats the run and prints its metrics."""
        options = {
            "task": self.task.spec,
            "optimizer": self.variant,
            "lr": self.lr,
            "seed": self.seed,
            "steps": self.settings["max_steps"],
            "episodes": self.n,
        }
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return "OMP_NUM_THREADS=1 " + shlex.join(["python", "-m", self.module, *words])

    @classmethod
    def repeat(cls, argv: list[str] | None, about: str | None) -> None:
        """Run the command that repeats a run: print a line with its metrics at full precision."""
        parser = cls._parser(about)
        arguments = parser.parse_args(argv)
        with reported_errors(parser):
            at_least(0, seed=arguments.seed)
            at_least(1, steps=arguments.steps, episodes=arguments.episodes)
            trial = cls._trial_of(arguments)
            trial.model_identity()  # raises an error if a setting is out of range
            grade = trial.train_and_grade()
            found = grade.means().items() if grade else [("diverged", True)]
            numbers = "  ".join(f"{name} {value!r}" for name, value in found)
            print(f"{trial.variant}  lr {trial.lr:g}  seed {trial.seed}  {numbers}")

    @classmethod
    def _parser(cls, about: str | None) -> ArgumentParser:
        parser = command_parser(cls.module, about)
        add, task = parser.add_argument, cls.task_type
        add(
            "--task",
            default=task.name,
            help="NAME,knob=value,...; the instance defaults to --seed",
        )
        add("--optimizer", required=True, help="see studies/sweep/variants.py")
        add("--lr", type=float, required=True)
        add("--seed", type=int, default=0, help="seed of the weights and the batches")
        add("--steps", type=int, default=cls.default_steps)
        add("--episodes", type=int, default=task.default_episodes, help="graded rollouts")
        return parser

    @classmethod
    def _trial_of(cls, arguments: Namespace) -> "PolicyTrial":
        """Return the run that the command line describes."""
        task = parse_task(arguments.task, {cls.task_type.name: cls.task_type})
        if task.has_instances and "instance=" not in arguments.task:
            task = replace(task, instance=arguments.seed)
        variant = cls.parse_variant(arguments.optimizer)
        return cls(
            folder=Path(),
            task=task,
            variant=variant.name,
            base=variant.base,
            role="single",
            lr=arguments.lr,
            seed=arguments.seed,
            settings={"max_steps": arguments.steps} | dict(variant.settings),
            n=arguments.episodes,
        )
