"""Make the demonstrations of an expert once, and keep them on disk.

A set takes about a second for each thousand steps. It is in a file of data/task/humanoid, whose
name is a hash of everything that determines it.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from filelock import FileLock

from data.files import write_atomic
from eval.rollout.tasks.task import PREPARED
from studies.humanoid.cloning import spread
from studies.humanoid.episodes import Episodes, Policy, rollout
from studies.humanoid.expert import load_expert
from studies.humanoid.simulator import gymnasium, mujoco
from studies.humanoid.stand import Standing
from studies.humanoid.task import STAND, Humanoid

FOLDER = PREPARED.parent / "humanoid"
TRAINING_SEED, VALIDATION_SEED = 0, 1  # of the first states; see GRADING_SEED in grading.py
N_VALIDATION = 5  # episodes
VERSION = 1  # raise it when a change of the code changes the demonstrations


@dataclass(frozen=True)
class Demonstrations:
    """Steps of episodes of the expert, one after the other; those for validation have no noise."""

    observations: np.ndarray  # (steps, 348) float32
    actions: np.ndarray  # (steps, 17) float32
    val_observations: list[np.ndarray]  # N_VALIDATION of (length, 348)
    val_actions: list[np.ndarray]  # N_VALIDATION of (length, 17)
    expert_return: float  # mean of the validation episodes


def expert_policy(name: str) -> Policy:
    """Return the expert with that name."""
    return Standing() if name == STAND else load_expert(name)


def demonstrations_of(task: Humanoid) -> Demonstrations:
    """Return the demonstrations of a task, from disk if they exist; without label noise."""
    path = FOLDER / f"{_fingerprint(task)}.npz"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock"), mode=0o644):
        if not path.exists():
            _save(path, _make(task))
    with np.load(path) as file:
        arrays = dict(file)
    ends = arrays["val_lengths"].cumsum()[:-1]
    return Demonstrations(
        observations=arrays["observations"],
        actions=arrays["actions"],
        val_observations=np.split(arrays["val_observations"], ends),
        val_actions=np.split(arrays["val_actions"], ends),
        expert_return=float(arrays["expert_return"]),
    )


def labels_of(task: Humanoid, actions: np.ndarray) -> np.ndarray:
    """Return the labels that clones are trained on: actions (steps, 17) with label noise."""
    noise = np.random.default_rng(TRAINING_SEED).standard_normal(actions.shape)
    return (actions + task.label_noise * spread(actions) * noise).astype(np.float32)


def _fingerprint(task: Humanoid) -> str:
    """Return a hash of everything that the demonstrations depend on."""
    versions = [VERSION, mujoco.__version__, gymnasium.__version__]
    sizes = [task.demonstrations, task.length, N_VALIDATION, task.noise]
    content = json.dumps([task.expert, task.expert_hash(), sizes, versions])
    return f"{task.expert}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _make(task: Humanoid) -> dict[str, np.ndarray]:
    """Run the expert. Return the arrays of a file."""
    expert: Callable = expert_policy(task.expert)
    training = rollout(expert, task.demonstrations, TRAINING_SEED, task.noise)
    validation = rollout(expert, N_VALIDATION, VALIDATION_SEED)
    observations, actions, _ = _joined(training, task.length)
    val_observations, val_actions, val_lengths = _joined(validation, task.length)
    return {
        "observations": observations,
        "actions": actions,
        "val_observations": val_observations,
        "val_actions": val_actions,
        "val_lengths": val_lengths,
        "expert_return": validation.returns.mean(),
    }


def _joined(episodes: Episodes, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first `length` observations and actions of all episodes, and their numbers."""
    actions = [each[:length] for each in episodes.actions]
    observations = [each[:length] for each in episodes.observations]
    return np.concatenate(observations), np.concatenate(actions), np.array([*map(len, actions)])


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    file = BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    write_atomic(path, [file.getvalue()])
