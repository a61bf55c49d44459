"""Test that every stage of the humanoid study is a valid command."""

from pathlib import Path

import pytest

from studies.humanoid.all_stages import GRID, STAGES
from studies.sweep.compare import notes, parse, study_of


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_is_a_command_that_compare_takes(stage, tmp_path):
    study = study_of(parse(stage.argv(tmp_path, 1))[1])
    words = stage.name.split("-")
    expert, demonstrations = ("stand", 90) if stage.name == "stand" else ("walk-1", 10)
    if words[0] == "grid":
        expert, demonstrations = "-".join(words[1:3]), int(words[3])
        assert len(study.variants) == 20
    if words[0] in {"why", "own"} and "signum" not in words:
        expert = "walk-2"
    short = words[0] in {"grid", "why", "own"}
    assert (study.tuning_seeds, study.n) == ((1, 10) if short else (2, 20))
    assert study.task.expert == expert
    assert study.task.demonstrations == (20 if stage.name.endswith("-20") else demonstrations)
    lacks_base = stage.name.endswith("another") or stage.name.startswith("own-batch")
    assert (notes(study) == "") is not lacks_base
    assert not any(tmp_path.iterdir())


def test_the_grid_has_every_expert_with_ten_and_with_twenty_demonstrations():
    cells = {study_of(parse(each.argv(Path("out"), 1))[1]).task.spec for each in GRID}
    assert len(cells) == len(GRID) == 6
