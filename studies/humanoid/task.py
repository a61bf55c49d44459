"""Define the task `humanoid`: clone an expert of Humanoid-v5 from a few of its episodes.

The policies see the states of the expert in training and their own states in a rollout, where their
errors feed back. Policies are ranked by their mean return. The rollout error, whose logarithm the
studies compare, is the shortfall,

    shortfall = 1 - return / return of the expert,

the part of the expert's return that is missing. It is at least half an episode of n + 1, as for
every task: one fall in n episodes can cost up to 1 / n, so a smaller error cannot be told from 0.

A seed draws the weights and the batches. It draws neither the demonstrations nor the first states
of the rollouts, which are the same for all runs.
"""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from eval.rollout.metrics import Grade
from eval.rollout.tasks.task import TaskBase, TaskError, later_knob
from studies.humanoid.expert import FOLDER

STAND = "stand"
OWN, ANOTHER = "own", "another"  # a batch


def experts() -> tuple[str, ...]:
    """Return the names of the experts: the committed walking ones, and the standing one."""
    return *sorted(path.stem for path in FOLDER.glob("*.npz")), STAND


@dataclass(frozen=True, kw_only=True)
class Humanoid(TaskBase):
    """The expert, its demonstrations, and the size of the policies that imitate it.

    Raises TaskError if gymnasium or MuJoCo is missing.
    """

    expert: str = "walk-0"
    demonstrations: int = 10  # episodes of the expert
    length: int = 1000  # steps of a demonstration that are used, from its beginning
    width: int = 128  # of the three hidden layers
    noise: float = 0.0  # standard deviation of Gaussian noise added to each executed action
    whitening: float = 0.0  # of the inputs, below 1; 0 leaves them standardized, see Scaling
    batch_size: int = later_knob(128)  # steps of the demonstrations in a step of training
    # Standard deviation of Gaussian noise added to each recorded action, in units of the actions'.
    # It is drawn once and is the same for all seeds.
    label_noise: float = later_knob(0.0)
    sigma_batch: str = later_knob(
        OWN
    )  # that gives Σ in each step: that of the gradient, or another

    name: ClassVar[str] = "humanoid"
    primary: ClassVar[str] = "return"
    higher_is_better: ClassVar[bool] = True
    default_episodes: ClassVar[int] = 20
    references: ClassVar[tuple[str, ...]] = ("expert", "zero")

    def claims(self) -> dict[str, bool]:
        known = experts()
        return {
            f"expert={self.expert}: must be one of {', '.join(known)}": self.expert in known,
            f"length={self.length}: must be at most 1000": self.length <= 1000,
            f"noise={self.noise}: must be from 0 to 1": 0 <= self.noise <= 1,
            f"whitening={self.whitening}: must be at least 0 and below 1": 0 <= self.whitening < 1,
            f"sigma_batch={self.sigma_batch}: must be {OWN} or {ANOTHER}": (
                self.sigma_batch in (OWN, ANOTHER)
            ),
            f"label_noise={self.label_noise}: must be from 0 to 10": 0 <= self.label_noise <= 10,
        } | self.at_least(demonstrations=1, length=1, width=1, batch_size=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            import studies.humanoid.simulator  # noqa: F401
        except ImportError as error:
            raise TaskError(f"task {self.name}: {error}") from None

    def grade_reference(self, name: str, *, n: int, seed: int) -> Grade:
        """Grade "expert", which is cloned, or "zero", the policy that never acts."""
        from studies.humanoid.demonstrations import expert_policy  # requires the simulator
        from studies.humanoid.grading import grade_policy, never_acts

        policies = {"expert": expert_policy(self.expert), "zero": never_acts}
        return grade_policy(self, policies[name], n, seed)

    def expert_hash(self) -> str:
        """Return a hash of the expert's weights; "" for the standing expert, which has none."""
        if self.expert == STAND:
            return ""
        return hashlib.sha256((FOLDER / f"{self.expert}.npz").read_bytes()).hexdigest()[:12]
