"""Grade reference policies that no optimizer trained: the task's source and two extremes.

    python -m studies.sweep.reference ctrl,instance=200 --episodes 1024

oracle      the source itself; its rollouts are the data's
greedy      always the source's likeliest token: no imitation, but no accidents either
uniform     every token equally likely, whatever came before
zero        on lds and humanoid, whose models are policies: the policy that never acts
expert      on humanoid: the expert that is cloned
"""

import math
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.command import at_least, command_parser
from eval.rollout.environment import Environment
from eval.rollout.metrics import Grade
from eval.rollout.policy import Predictor
from eval.rollout.record import make_record
from eval.rollout.tasks import TASKS, TaskError, parse_task
from eval.rollout.tasks.lds import Lds, grade_policy
from eval.rollout.tasks.task import OracleTask, TaskBase
from studies.humanoid.task import Humanoid
from studies.sweep.trial import Trial
from trainer.metrics import environment

STUDY_TASKS: dict[str, Any] = TASKS | {each.name: each for each in (Lds, Humanoid)}
ORACLE_REFERENCES = ("oracle", "greedy", "uniform")
POLICY_REFERENCES = ("expert", "zero")


class OraclePredictor(Predictor):
    """Predict what the oracle predicts, by playing the episodes in a copy of the environment.

    The tokens that are read must be those that the copy answers.

    Args:
        environment: the environment that grades, at its beginning. It is not changed.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        self.copy = deepcopy(self.environment)
        assert prompts.equal(self.copy.prompts)
        return self.copy.oracle().log()

    def read(self, tokens: Tensor) -> Tensor:  # (B, 1 + k): a decision and the answer to it
        assert tokens[:, 1:].equal(self.copy.step(tokens[:, 0]))
        return self.copy.oracle().log()


class GreedyPredictor(Predictor):
    """Give all probability to the likeliest token of another predictor."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        return self._likeliest(self.predictor.start(prompts))

    def read(self, tokens: Tensor) -> Tensor:
        return self._likeliest(self.predictor.read(tokens))

    def _likeliest(self, log_p: Tensor) -> Tensor:  # (B, V) -> (B, V)
        impossible = torch.full_like(log_p, -math.inf)
        return impossible.scatter_(1, log_p.argmax(1, keepdim=True), 0.0)


class UniformPredictor(Predictor):
    """Give each of `n_vocab` tokens the same probability."""

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab = n_vocab

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        return self.read(prompts)

    def read(self, tokens: Tensor) -> Tensor:
        shape = len(tokens), self.n_vocab
        return torch.full(shape, -math.log(self.n_vocab), dtype=torch.float64)


def references_of(task: TaskBase) -> dict[str, Callable[[int, int], Grade]]:
    """Return {name: function of the number of episodes and their seed that grades the reference}.

    The result is empty if the task has neither an oracle nor an expert.
    """
    if isinstance(task, Lds):
        return {"zero": lambda n, seed: grade_policy(task, np.zeros_like(task.expert))}
    if isinstance(task, Humanoid):
        return {name: partial(_grade_humanoid, task, name) for name in POLICY_REFERENCES}
    if isinstance(task, OracleTask):
        return {name: partial(_grade_with_oracle, task, name) for name in ORACLE_REFERENCES}
    return {}


def _grade_humanoid(task: Humanoid, name: str, n: int, seed: int) -> Grade:
    from studies.humanoid.grading import grade_reference  # requires gymnasium and MuJoCo

    return grade_reference(task, name, n, seed)


def _grade_with_oracle(task: OracleTask, name: str, n: int, seed: int) -> Grade:
    environment = task.environment(n, seed)
    oracle = OraclePredictor(environment)
    uniform = UniformPredictor(environment.oracle().size(1))
    models = {"oracle": oracle, "greedy": GreedyPredictor(oracle), "uniform": uniform}
    return task.grade(models[name], n=n, seed=seed)


class ReferenceTrial(Trial):
    """A reference policy. Its `variant` is the name of the reference."""

    def model_identity(self) -> dict[str, Any]:
        return {"spec": self.task.spec}

    def make(self) -> dict[str, Any]:
        grade = references_of(self.task)[self.variant](self.n, self.grading_seed)
        sizes = {"batch_size": 0, "block_size": 0}
        loss = grade.metrics.get("val_loss") or grade.metrics["val_ce"]  # the first is of policies
        return make_record(
            self.task,
            {"optimizer": self.base, "dopr": False, "lr": 0.0, "seed": self.seed, **sizes},
            steps=self.settings["max_steps"],
            val_loss=loss.mean,
            grade=grade.to_json() | {"samples": []},
            command=command_of(self.task.spec, n=self.n, seed=self.grading_seed),
            environment=environment(torch.device("cpu")),
        )


def command_of(spec: str, *, n: int, seed: int) -> str:
    """Return the command that computes these grades again."""
    return f"python -m studies.sweep.reference {spec} --episodes {n} --seed {seed}"


def main(argv: list[str]) -> None:
    parser = command_parser("studies.sweep.reference", __doc__)
    parser.add_argument("task", help=f"{', '.join(STUDY_TASKS)}; NAME,knob=value,...")
    parser.add_argument("--episodes", type=int, help="default: as in studies.sweep.compare")
    parser.add_argument("--seed", type=int, default=0, help="seed of the episodes")
    arguments = parser.parse_args(argv)
    try:
        at_least(1, episodes=arguments.episodes)
        task = parse_task(arguments.task, STUDY_TASKS)
        if not (references := references_of(task)):
            raise ValueError(f"task {task.name}: it has no oracle, so it has no references")
    except (TaskError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    for name, grade in references.items():
        means = grade(arguments.episodes or task.default_episodes, arguments.seed).means()
        print(f"{name}  " + "  ".join(f"{metric} {value:.6g}" for metric, value in means.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
