"""Train a clone of an expert of Humanoid-v5 and grade it in rollouts.

    python -m studies.humanoid.trial --optimizer fast-dopr-adamw --lr 2e-3 --seed 10

repeats one run of a comparison and prints a line with its metrics at full precision. See task.py
for the task and grading.py for the metrics. Requires pip install '.[humanoid]'.
"""

from typing import Any, ClassVar

from eval.rollout.metrics import Grade
from studies.humanoid.cloning import Clone, train_clone
from studies.humanoid.task import OWN, Humanoid
from studies.sweep.policy_trial import PolicyTrial
from trainer.presets import DOPR_KEYS

LAYERS = ("include", "exclude")  # a layer of the network: 0, 2, 4 or 6
AVERAGE, SCHEDULE = "ema_decay", "schedule"
FIRST_LAYER = "embedding_lr"


class HumanoidTrial(PolicyTrial):
    """A clone. Its biases, which muon and adamuon leave to AdamW, have the rate of optim.build.

    `embedding_lr` is the rate of the first layer, which takes the inputs as an embedding does.
    """

    module = "studies.humanoid.trial"
    task_type = Humanoid
    default_steps = 2000
    dopr_settings: ClassVar = {*DOPR_KEYS, *LAYERS}
    other_settings: ClassVar = {AVERAGE, SCHEDULE, FIRST_LAYER}
    further_commands: ClassVar = {
        "the rates that rollouts would choose": "python -m studies.humanoid.tables {out}",
        "bases that train longer, at equal validation loss": (
            "python -m studies.humanoid.matched --out FILE"
        ),
    }
    grids: ClassVar = {
        "adamw": (5e-4, 1e-3, 2e-3),
        "sgd": (0.05, 0.1, 0.2),
        "signum": (5e-5, 1e-4, 2e-4),
        "muon": (1e-3, 2e-3, 4e-3),
        "adamuon": (1e-3, 2e-3, 4e-3),
    }

    @property
    def batch_size(self) -> int:
        return self.task.batch_size

    def model_identity(self) -> dict[str, Any]:
        return super().model_identity() | {"expert": self.task.expert_hash()}

    def train_and_grade(self) -> Grade | None:
        from studies.humanoid.grading import grade_policy  # requires the simulator

        clone = clone_of(self.task, self.settings, self.lr, self.seed)
        return clone and grade_policy(self.task, clone, self.n, self.grading_seed)

    def make(self) -> dict[str, Any]:
        from studies.humanoid.grading import STRIDE
        from studies.humanoid.simulator import gymnasium, mujoco

        record = super().make()
        record["environment"] |= {
            "gymnasium": gymnasium.__version__,
            "mujoco": mujoco.__version__,
        }
        return record | {"grade": record["grade"] and record["grade"] | {"stride": STRIDE}}


def clone_of(
    task: Humanoid, settings: dict[str, Any], lr: float, seed: int, data_at_step: Any = None
) -> Clone | None:
    """Train a clone with the settings of a variant; None if it diverged.

    data_at_step: see train_clone.
    """
    # They require the simulator.
    from studies.humanoid.demonstrations import demonstrations_of, labels_of

    dopr = {key: settings[key] for key in DOPR_KEYS if key in settings}
    dopr |= {key: [settings[key]] for key in LAYERS if key in settings}
    data = demonstrations_of(task)
    return train_clone(
        data.observations,
        labels_of(task, data.actions),
        width=task.width,
        optimizer=settings["optimizer"],
        optimizer_args=settings.get("optimizer_args", ""),
        lr=lr,
        seed=seed,
        steps=settings["max_steps"],
        dopr=dopr,
        batch_size=task.batch_size,
        own_sigma=task.sigma_batch == OWN,
        whitening=task.whitening,
        ema_decay=settings.get(AVERAGE, 0.0),
        first_layer_lr=settings.get(FIRST_LAYER),
        schedule=settings.get(SCHEDULE, "cosine"),
        data_at_step=data_at_step,
    )


def main(argv: list[str] | None = None) -> None:
    HumanoidTrial.repeat(argv, __doc__)


if __name__ == "__main__":
    main()
