"""The figure shows the pair at equal validation loss, and every run."""

import numpy as np
import pytest

from studies.humanoid import figure
from studies.humanoid.all_stages import STAGES
from studies.humanoid.figure import BEFORE, chosen_pair, draw, median_index
from studies.humanoid.matched import DOPR
from studies.humanoid.strobe import HIGH, LOW
from studies.sweep.compare import notes, parse, study_of


def row(variant, steps, loss, returns=(1000.0, 3000.0, 2000.0)):
    losses = {"val_loss": [loss] * len(returns), "return": list(returns), "falls": [0.5, 1, 0]}
    return {"variant": variant, "steps": steps, "survival": [1.0, 0.5]} | losses


def test_the_pair_has_the_shortest_base_whose_loss_is_not_higher():
    own = row(DOPR + "adamw", 2000, 3e-4)
    bases = [row("adamw", n, loss) for n, loss in ((8000, 1e-4), (2000, 5e-4), (4000, 3e-4))]
    assert chosen_pair([*bases, row(DOPR + "adamw", 500, 9e-4), own]) == (bases[2], own)
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
    rows = [row("adamw", 4000, 3e-4), row(DOPR + "adamw", 2000, 3e-4)]
    found = draw(rows, [(positions, BEFORE + 55), (-positions, 1000)])
    assert [each[0, 0] for each in shown] == [55, -55]
    base, dopr, survival, returns = found.axes
    assert base.get_title(loc="left").startswith("AdamW, 4,000 steps: validation loss 0.00030")
    assert "return 2,000, 50% fall" in dopr.get_title(loc="left")
    assert base.get_ylim() == (LOW, HIGH)
    assert survival.lines[0].get_ydata().tolist() == [1.0, 1.0, 0.5]
    assert sum(len(line.get_xdata()) for line in returns.lines) == 2 * (3 + 1)  # runs and means


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_is_a_command_that_compare_takes(stage, tmp_path):
    study = study_of(parse(stage.argv(tmp_path, 1))[1])
    assert (study.task.expert, study.n) == ("walk-1", 20)
    assert notes(study) == ""
    assert not any(tmp_path.iterdir())
