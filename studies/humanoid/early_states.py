"""Compare the errors of clones on the expert's states, by the step of the episode.

    python -m studies.humanoid.early_states studies/results/humanoid_matched.json

A validation loss is a mean over 1,000 steps, most of which look alike. Clones of equal loss could
thus differ in the first steps, where an episode is decided. This trains runs of RESULTS.json again,
on the first seeds, and prints their errors in the first steps of the validation episodes. A second
table has the errors of all seeds on the clones' own states, which RESULTS.json holds.
"""

import sys
from pathlib import Path

import numpy as np

from eval.command import command_parser, reported_errors
from eval.tables import markdown
from studies.humanoid.cloning import spread
from studies.humanoid.demonstrations import demonstrations_of
from studies.humanoid.episodes import LIMIT_STEPS
from studies.humanoid.grading import WINDOWS, squared_errors
from studies.humanoid.matched import Setup, key_of
from studies.humanoid.task import Humanoid
from studies.humanoid.trial import HumanoidTrial, clone_of
from studies.rows import load_rows
from studies.sweep.study import FRESH
from studies.sweep.variants import FAST_PREFIX

PAIRS = ((2000, 1000), (8000, 2000))  # steps without and with DoPr, of nearly equal loss
N_SEEDS = 3
PARTS = (*WINDOWS, (WINDOWS[-1][1], LIMIT_STEPS), (0, LIMIT_STEPS))


def errors_of(setup: Setup, lr: float, seed: int) -> list[float]:
    """Train a clone. Return its mean squared error on the expert's states in each of PARTS."""
    task = Humanoid(expert=setup.expert)
    settings = dict(HumanoidTrial.parse_variant(setup.variant).settings)
    clone, data = (
        clone_of(task, settings | {"max_steps": setup.steps}, lr, seed),
        demonstrations_of(task),
    )
    assert clone, "the run of the results did not diverge"
    chosen = [clone(states) for states in data.val_observations]
    errors = squared_errors(chosen, data.val_actions, spread(data.actions))  # (n, LIMIT_STEPS)
    return [float(np.nanmean(errors[:, start:end])) for start, end in PARTS]


def main(argv: list[str]) -> None:
    parser = command_parser("studies.humanoid.early_states", __doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--expert", default="walk-1")
    arguments = parser.parse_args(argv)
    with reported_errors(parser):
        rows = load_rows(arguments.results, key_of)
        cells, own = [], []
        for pair in PAIRS:
            for variant, steps in zip(("adamw", f"{FAST_PREFIX}adamw"), pair, strict=True):
                setup = Setup(arguments.expert, variant, steps)
                if setup not in rows:
                    raise ValueError(f"{arguments.results} has no row of {setup}")
                lr, seeds = rows[setup]["lr"], range(FRESH, FRESH + N_SEEDS)
                means = np.mean([errors_of(setup, lr, seed) for seed in seeds], axis=0)
                cells.append((f"`{variant}`", f"{steps:,}", *(f"{each:.5f}" for each in means)))
                errors = [np.mean(rows[setup][f"action_error_steps_{a}-{b}"]) for a, b in WINDOWS]
                own.append((*cells[-1][:2], *(f"{each:.4f}" for each in errors)))
        columns = [f"{start} to {end}" for start, end in PARTS]
        print(markdown(("", "steps", *columns), cells))
        print("\nOn their own states:\n")
        print(markdown(("", "steps", *columns[: len(WINDOWS)]), own))


if __name__ == "__main__":
    main(sys.argv[1:])
