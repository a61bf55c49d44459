"""Test that the figure shows the pair at equal validation loss, and every run."""

import numpy as np
import pytest

from studies.humanoid import figure
from studies.humanoid.episodes import Episodes, first_states
from studies.humanoid.figure import (
    AFTER,
    BEFORE,
    N,
    chosen_pair,
    draw,
    median_film,
    median_index,
)
from studies.humanoid.grading import GRADING_SEED
from studies.humanoid.strobe import HIGH, LOW
from studies.sweep.study import FRESH
from studies.sweep.variants import FAST_PREFIX


def row(variant, steps, loss, returns=(1000.0, 3000.0, 2000.0)):
    losses = {"val_loss": [loss] * len(returns), "return": list(returns), "falls": [0.5, 1, 0]}
    return {"variant": variant, "steps": steps, "survival": [1.0, 0.5]} | losses


def test_the_pair_has_the_shortest_base_whose_loss_is_not_higher():
    own = row(FAST_PREFIX + "adamw", 2000, 3e-4)
    bases = [row("adamw", n, loss) for n, loss in ((8000, 1e-4), (2000, 5e-4), (4000, 3e-4))]
    assert chosen_pair([*bases, row(FAST_PREFIX + "adamw", 500, 9e-4), own]) == (bases[2], own)
    with pytest.raises(ValueError, match="no run without DoPr has a validation loss"):
        chosen_pair([bases[1], own])


@pytest.mark.parametrize(("values", "expected"), [([3, 1, 2], 2), ([4, 1, 3, 2], 3), ([5], 0)])
def test_the_median_is_the_lower_one_of_two(values, expected):
    assert median_index(values) == expected


def test_both_strips_begin_at_the_same_step_before_the_base_falls(monkeypatch):
    shown = []

    def strobe(positions, *_):
        shown.append(positions)
        return np.zeros((4, 8, 4), np.uint8)

    monkeypatch.setattr(figure, "strobe", strobe)
    positions = np.repeat(np.arange(1090.0)[:, None], 24, axis=1)
    rows = [row("adamw", 4000, 3e-4), row(FAST_PREFIX + "adamw", 2000, 3e-4)]
    found = draw(rows, [(positions, BEFORE + 55), (-positions, 1000)])
    assert [each[0, 0] for each in shown] == [55, -55]
    base, dopr, survival, returns = found.axes
    assert base.get_title(loc="left").startswith("AdamW, 4,000 steps: validation loss 0.00030")
    assert "return 2,000, 50% fall" in dopr.get_title(loc="left")
    assert base.get_ylim() == (LOW, HIGH)
    assert survival.lines[0].get_ydata().tolist() == [1.0, 1.0, 0.5]
    assert sum(len(line.get_xdata()) for line in returns.lines) == 2 * (3 + 1)  # runs and means


def test_the_film_shows_the_median_episode_of_the_median_seed(monkeypatch):
    seen = {}

    def clone_of(task, settings, lr, seed):
        seen["run"] = (task.expert, settings["optimizer"], settings["max_steps"], lr, seed)
        return "the clone"

    def rollout(policy, n, seed):
        actions = [np.full((length, 17), length) for length in (9, 5, 7)]
        return Episodes(np.array([9.0, 5.0, 7.0]), np.array([9, 5, 7]), [], actions)

    def film(start, actions, policy, steps):
        seen["film"] = (start, len(actions), policy, steps)

    for name, function in (("clone_of", clone_of), ("rollout", rollout), ("film", film)):
        monkeypatch.setattr(figure, name, function)
    own = row(FAST_PREFIX + "adamw", 2000, 3e-4) | {"expert": "walk-2", "lr": 0.25}
    assert median_film(own)[1] == 7
    assert seen["run"] == ("walk-2", "adamw", 2000, 0.25, FRESH + 2)
    assert seen["film"] == (first_states(N, GRADING_SEED)[2], 7, "the clone", 1000 + AFTER)


def test_a_file_without_the_clone_to_show_is_named():
    with pytest.raises(ValueError, match="no run of this expert with DoPr and 2000 steps"):
        chosen_pair([row("adamw", 2000, 1e-4)])
