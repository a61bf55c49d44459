"""Grade the reference policies of a task, which no optimizer trained.

    python -m studies.sweep.reference ctrl,instance=200 --episodes 1024

oracle, greedy, uniform    on tasks with an oracle, see eval/rollout/tasks/references.py
zero                       on lds and humanoid: the policy that never acts
expert                     on humanoid: the expert that is cloned
"""

import sys
from typing import Any

import torch

from eval.command import at_least, command_parser, reported_errors
from eval.rollout.record import make_record
from eval.rollout.tasks import parse_task
from studies.sweep.tasks import STUDY_TASKS
from studies.sweep.trial import Trial
from trainer.provenance import provenance


class ReferenceTrial(Trial):
    """A reference policy. Its `variant` is the name of the reference."""

    def model_identity(self) -> dict[str, Any]:
        return {"spec": self.task.spec}

    def make(self) -> dict[str, Any]:
        grade = self.task.grade_reference(self.variant, n=self.n, seed=self.grading_seed)
        sizes = {"batch_size": 0, "block_size": 0}
        loss = grade.metrics.get("val_loss") or grade.metrics["val_ce"]  # the first is of policies
        return make_record(
            self.task,
            {"optimizer": self.base, "dopr": False, "lr": 0.0, "seed": self.seed, **sizes},
            steps=self.settings["max_steps"],
            val_loss=loss.mean,
            grade=grade.to_json() | {"samples": []},
            command=command_of(self.task.spec, n=self.n, seed=self.grading_seed),
            environment=provenance(torch.device("cpu")),
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
    with reported_errors(parser):
        at_least(1, episodes=arguments.episodes)
        task = parse_task(arguments.task, STUDY_TASKS)
        if not task.references:
            raise ValueError(f"task {task.name}: it has no oracle, so it has no references")
        n = arguments.episodes or task.default_episodes
        for name in task.references:
            means = task.grade_reference(name, n=n, seed=arguments.seed).means()
            numbers = "  ".join(f"{metric} {value:.6g}" for metric, value in means.items())
            print(f"{name}  {numbers}")


if __name__ == "__main__":
    main(sys.argv[1:])
