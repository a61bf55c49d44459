"""Train a clone of an expert of Humanoid-v5 and grade it in rollouts.

    python -m studies.humanoid.trial --optimizer fast-dopr-adamw --lr 2e-3 --seed 10

repeats one run of a comparison and prints a line with its metrics at full precision. See task.py
for the task and grading.py for the metrics. Requires pip install '.[humanoid]'.
"""

import shlex
import sys
from typing import Any, ClassVar

import torch

from eval.command import at_least, command_parser, reported_errors
from eval.rollout.metrics import Grade
from eval.rollout.record import make_record
from eval.rollout.tasks import parse_task
from eval.rollout.ttf import grading_version
from studies.humanoid.cloning import BATCH_SIZE, Clone, train_clone
from studies.humanoid.task import Humanoid
from studies.sweep.policy_trial import PolicyTrial
from studies.sweep.variants import Variant, parse_dopr_variant
from trainer.metrics import environment
from trainer.presets import DOPR_KEYS

LAYERS = ("include", "exclude")  # a layer of the network: 0, 2, 4 or 6
AVERAGE, SCHEDULE = "ema_decay", "schedule"


class HumanoidTrial(PolicyTrial):
    """A clone, trained and graded in this process without train.py.

    The biases, which muon and adamuon leave to AdamW, have the default rate of optim.build.
    """

    task_name = Humanoid.name
    grids: ClassVar = {
        "adamw": (5e-4, 1e-3, 2e-3),
        "sgd": (0.05, 0.1, 0.2),
        "signum": (5e-5, 1e-4, 2e-4),
        "muon": (1e-3, 2e-3, 4e-3),
        "adamuon": (1e-3, 2e-3, 4e-3),
    }

    @staticmethod
    def parse_variant(name: str) -> Variant:
        return parse_dopr_variant(name, Humanoid.name, {*DOPR_KEYS, *LAYERS}, AVERAGE, SCHEDULE)

    def model_identity(self) -> dict[str, Any]:
        return super().model_identity() | {"expert": self.task.expert_hash()}

    def make(self) -> dict[str, Any]:
        from studies.humanoid.grading import STRIDE
        from studies.humanoid.simulator import gymnasium, mujoco

        steps = self.settings["max_steps"]
        grade = train_and_grade(
            self.task, self.settings, self.lr, self.seed, self.n, self.grading_seed
        )
        versions = {"gymnasium": gymnasium.__version__, "mujoco": mujoco.__version__}
        sizes = {"batch_size": BATCH_SIZE, "block_size": 1}
        code = grading_version(self.task)
        return make_record(
            self.task,
            self.settings | {"lr": self.lr, "seed": self.seed} | sizes,
            steps=steps,
            val_loss=grade and grade.metrics["val_loss"].mean,
            grade=grade and grade.to_json() | {"stride": STRIDE},
            grading={"n": self.n, "seed": self.grading_seed, "code": code},
            command=command_of(self),
            environment=environment(torch.device("cpu")) | versions,
        )


def clone_of(
    task: Humanoid, settings: dict[str, Any], lr: float, seed: int, data_at_step: Any = None
) -> Clone | None:
    """Train a clone with the settings of a variant; None if it diverged.

    data_at_step: see train_clone.
    """
    from studies.humanoid.demonstrations import demonstrations_of  # requires the simulator

    dopr = {key: settings[key] for key in DOPR_KEYS if key in settings}
    dopr |= {key: [settings[key]] for key in LAYERS if key in settings}
    data = demonstrations_of(task)
    return train_clone(
        data.observations,
        data.actions,
        width=task.width,
        optimizer=settings["optimizer"],
        optimizer_args=settings.get("optimizer_args", ""),
        lr=lr,
        seed=seed,
        steps=settings["max_steps"],
        dopr=dopr,
        whitening=task.whitening,
        ema_decay=settings.get(AVERAGE, 0.0),
        schedule=settings.get(SCHEDULE, "cosine"),
        data_at_step=data_at_step,
    )


def train_and_grade(
    task: Humanoid, settings: dict[str, Any], lr: float, seed: int, n: int, grading_seed: int = 0
) -> Grade | None:
    """Train a clone with the settings of a variant, and grade it; None if it diverged."""
    from studies.humanoid.grading import grade_policy  # requires the simulator

    clone = clone_of(task, settings, lr, seed)
    return clone and grade_policy(task, clone, n, grading_seed)


def command_of(trial: HumanoidTrial) -> str:
    """Return the command that repeats a run."""
    options = {
        "task": trial.task.spec,
        "optimizer": trial.variant,
        "lr": trial.lr,
        "seed": trial.seed,
        "steps": trial.settings["max_steps"],
        "episodes": trial.n,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return "OMP_NUM_THREADS=1 " + shlex.join(["python", "-m", "studies.humanoid.trial", *words])


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("studies.humanoid.trial", __doc__)
    add = parser.add_argument
    add("--task", default=Humanoid.name, help="humanoid,knob=value,...; see task.py")
    add("--optimizer", required=True, help="see studies/sweep/variants.py")
    add("--lr", type=float, required=True)
    add("--seed", type=int, default=0, help="seed of the weights and the batches")
    add("--steps", type=int, default=2000)
    add("--episodes", type=int, default=Humanoid.default_episodes, help="graded rollouts")
    arguments = parser.parse_args(argv)
    with reported_errors(parser):
        if not 0 < arguments.lr < float("inf"):
            raise ValueError(f"--lr={arguments.lr}: must be positive and finite")
        at_least(0, seed=arguments.seed)
        at_least(1, steps=arguments.steps, episodes=arguments.episodes)
        task = parse_task(arguments.task, {Humanoid.name: Humanoid})
        settings = dict(HumanoidTrial.parse_variant(arguments.optimizer).settings)
        settings["max_steps"] = arguments.steps
        grade = train_and_grade(task, settings, arguments.lr, arguments.seed, arguments.episodes)
        found = grade.means().items() if grade else [("diverged", True)]
        numbers = "  ".join(f"{name} {value!r}" for name, value in found)
        print(f"{arguments.optimizer}  lr {arguments.lr:g}  seed {arguments.seed}  {numbers}")


if __name__ == "__main__":
    main(sys.argv[1:])
