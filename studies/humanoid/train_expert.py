"""Train a walking expert for Humanoid-v5 from nothing, in minutes on one core.

    python -m studies.humanoid.train_expert --seed 0 --out studies/humanoid/experts/walk-0.npz

The training uses coarser physics; every evaluation uses the unchanged environment. The training
ends as soon as no episode of an evaluation ends in a fall and the mean return is above the goal, in
10 episodes and then in 50 others. The learning curve is printed and written beside the weights, as
walk-0.json. The weights depend on the seed, the machine and the versions of the libraries alone.
"""

import json
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.files import write_atomic
from eval.command import at_least, command_parser, output_file, reported_errors
from studies.humanoid.body import N_COORDINATES, mirror
from studies.humanoid.episodes import rollout
from studies.humanoid.expert import Expert, pd_actions
from studies.humanoid.ppo import GAMMA, ActorCritic, Batch, Learner
from studies.humanoid.training_physics import TrainingPhysics

N_HUMANOIDS, STEPS = 64, 96  # of one iteration
EVALUATE_EVERY = 10  # iterations
EPISODES, CONFIRMING_EPISODES = 10, 50  # of an evaluation; of another one if the first is good
EVALUATION_SEED = 1_000_000  # used by nothing else
REWARD_SCALE = 1 - GAMMA  # values are then about as large as mean rewards
LOWEST_SCALE = 1e-2  # of an input


class RunningMoments:
    """The mean and the variance of all joint states so far and of their mirror images."""

    def __init__(self) -> None:
        self.n, self.sum, self.sum_of_squares = 0, np.zeros(N_COORDINATES), np.zeros(N_COORDINATES)

    def add(self, x: np.ndarray) -> None:  # (n, 45)
        for each in (x, mirror(x)):
            self.n += len(each)
            self.sum += each.sum(0)
            self.sum_of_squares += (each**2).sum(0)

    def copy_to(self, model: ActorCritic) -> None:
        mean = self.sum / self.n
        variance = np.maximum(self.sum_of_squares / self.n - mean**2, 0)
        model.mean.copy_(torch.as_tensor(mean))
        model.scale.copy_(torch.as_tensor(np.sqrt(variance) + LOWEST_SCALE))


def float32(array: np.ndarray) -> Tensor:
    return torch.as_tensor(array, dtype=torch.float32)


@torch.no_grad()
def collect(physics: TrainingPhysics, model: ActorCritic, generator: torch.Generator) -> Batch:
    """Return STEPS steps of the current policy."""
    steps: list[tuple[Tensor, ...]] = []
    for _ in range(STEPS):
        x = float32(physics.x)
        policy = model.policy(x)
        u = policy.loc + policy.scale * torch.randn(policy.loc.shape, generator=generator)
        reached, rewards, fell, timed_out = physics.step(pd_actions(physics.x, u.numpy()))
        ends = torch.as_tensor(fell), torch.as_tensor(fell | timed_out)
        steps.append((x, u, float32(reached), float32(REWARD_SCALE * rewards), *ends))
    return Batch(*(torch.stack(each) for each in zip(*steps, strict=True)))


def train(seed: int) -> Iterator[tuple[int, ActorCritic]]:
    """Yield the number of environment steps and the model after each iteration, forever."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    physics, model = TrainingPhysics(N_HUMANOIDS, seed), ActorCritic()
    learner, moments, n_steps = Learner(model, generator), RunningMoments(), 0
    while True:
        batch = collect(physics, model, generator)
        moments.add(batch.x.flatten(0, 1).double().numpy())
        moments.copy_to(model)
        learner.update(batch)
        n_steps += batch.rewards.numel()
        yield n_steps, model


def evaluate(model: ActorCritic, n: int, seed: int) -> dict[str, float]:
    """Return the results of n episodes in the unchanged environment."""
    episodes = rollout(Expert(model.expert_arrays()), n, seed)
    return {
        "episodes": n,
        "return": round(float(episodes.returns.mean()), 1),
        "length": round(float(episodes.lengths.mean()), 1),
        "falls": round(episodes.falls, 2),
    }


def reaches(goal: float, row: dict[str, float]) -> bool:
    """Return whether no episode of an evaluation ended in a fall and the return is above `goal`."""
    return row["falls"] == 0 and row["return"] > goal


def train_to(goal: float, max_steps: int, seed: int) -> tuple[ActorCritic, list[dict[str, float]]]:
    """Train until an evaluation reaches the goal, or for max_steps. Return the learning curve."""
    curve, start = [], time.perf_counter()
    for iteration, (n_steps, model) in enumerate(train(seed), 1):
        is_last = n_steps >= max_steps
        if iteration % EVALUATE_EVERY == 0 or is_last:
            seconds = round(time.perf_counter() - start, 1)
            found = evaluate(model, EPISODES, EVALUATION_SEED)
            if reaches(goal, found):
                found = evaluate(model, CONFIRMING_EPISODES, EVALUATION_SEED + 1)
            curve.append({"steps": n_steps, "seconds": seconds, **found})
            print(json.dumps(curve[-1]))
            if is_last or reaches(goal, curve[-1]):
                return model, curve
    raise AssertionError("train() has no end")


def save(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write an expert as .npz; equal arrays give equal files."""
    file = BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    write_atomic(path, [file.getvalue()])


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("studies.humanoid.train_expert", __doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=output_file, required=True, help="FILE.npz")
    parser.add_argument("--goal", type=float, default=6000.0, help="the mean return to reach")
    parser.add_argument("--max_steps", type=int, default=2_000_000, help="environment steps")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".npz":
        parser.error(f"--out={arguments.out}: must end in .npz")
    with reported_errors(parser):
        at_least(0, seed=arguments.seed)
        at_least(1, max_steps=arguments.max_steps)
        torch.set_num_threads(1)  # faster for so small a network, and the order of sums is fixed
        model, curve = train_to(arguments.goal, arguments.max_steps, arguments.seed)
        save(model.expert_arrays(), arguments.out)
        result = {"seed": arguments.seed, "curve": curve}
        write_atomic(arguments.out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    if reaches(arguments.goal, curve[-1]):
        return 0
    print(f"the goal, {arguments.goal:g} without a fall, was not reached", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
