"""The source and two extremes beside it: the rows of a table that no optimizer made.

    python -m studies.sweep.reference ctrl,instance=200 --episodes 1024

oracle      the source itself; its rollouts are the data's
greedy      the source's likeliest token, always: no imitation, but no accidents either
uniform     every token equally likely, whatever came before
zero        on lds, where a model is a matrix: the policy that never acts
"""

import math
import sys
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor

from eval.command import command_parser
from eval.rollout.environment import Environment
from eval.rollout.metrics import Grade
from eval.rollout.policy import Predictor
from eval.rollout.tasks import TASKS, Task, TaskError, parse_task
from eval.rollout.tasks.lds import Lds, grade_policy
from eval.rollout.tasks.task import OracleTask


class OraclePredictor(Predictor):
    """A model that equals the oracle: it lives through a twin of the world that it is graded in.

    world: at its beginning; it stays there. What is read must be what the twin answers.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        self.twin = deepcopy(self.environment)
        assert prompts.equal(self.twin.prompts)
        return self.twin.oracle().log()

    def read(self, tokens: Tensor) -> Tensor:  # (B, 1 + k): a decision and the world's answer
        assert tokens[:, 1:].equal(self.twin.step(tokens[:, 0]))
        return self.twin.oracle().log()


class GreedyPredictor(Predictor):
    """All mass on the likeliest token of another predictor."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        return self._likeliest(self.predictor.start(prompts))

    def read(self, tokens: Tensor) -> Tensor:
        return self._likeliest(self.predictor.read(tokens))

    def _likeliest(self, log_p: Tensor) -> Tensor:
        only = torch.full_like(log_p, -math.inf)
        return only.scatter_(1, log_p.argmax(1, keepdim=True), 0.0)


class UniformPredictor(Predictor):
    """Each of `n_vocab` tokens equally likely."""

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab = n_vocab

    def start(self, prompts: Tensor, length: int | None = None) -> Tensor:
        return self.read(prompts)

    def read(self, tokens: Tensor) -> Tensor:
        shape = len(tokens), self.n_vocab
        return torch.full(shape, -math.log(self.n_vocab), dtype=torch.float64)


def references_of(task: Task | Lds) -> tuple[str, ...]:
    """The names of a task's references; none where there is no oracle."""
    if isinstance(task, Lds):
        return ("zero",)
    return ("oracle", "greedy", "uniform") if isinstance(task, OracleTask) else ()


def grade_reference(task: OracleTask | Lds, name: str, *, n: int, seed: int) -> Grade:
    """How a reference does on n episodes."""
    if isinstance(task, Lds):
        return grade_policy(task, np.zeros_like(task.expert))
    environment = task.environment(n, seed)
    oracle = OraclePredictor(environment)
    uniform = UniformPredictor(environment.oracle().size(1))
    models = {"oracle": oracle, "greedy": GreedyPredictor(oracle), "uniform": uniform}
    return task.grade(models[name], n=n, seed=seed)


def command_of(spec: str, *, n: int, seed: int) -> str:
    """What makes these numbers again."""
    return f"python -m studies.sweep.reference {spec} --episodes {n} --seed {seed}"


def main(argv: list[str]) -> None:
    parser = command_parser("studies.sweep.reference", __doc__)
    parser.add_argument("task", help=f"{', '.join([*TASKS, Lds.name])}; NAME,knob=value,...")
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the episodes")
    arguments = parser.parse_args(argv)
    try:
        if arguments.episodes < 1:
            raise ValueError(f"--episodes={arguments.episodes}: must be at least 1")
        task = parse_task(arguments.task, TASKS | {Lds.name: Lds})
        if not isinstance(task, OracleTask | Lds):
            raise ValueError(f"task {task.name}: it has no oracle, so it has no references")
    except (TaskError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    for name in references_of(task):
        means = grade_reference(task, name, n=arguments.episodes, seed=arguments.seed).means()
        print(f"{name}  " + "  ".join(f"{metric} {value:.6g}" for metric, value in means.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
