"""Test that every stage of the humanoid study is a valid command."""

import pytest

from studies.humanoid.all_stages import STAGES
from studies.sweep.compare import notes, parse, study_of


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_is_a_command_that_compare_takes(stage, tmp_path):
    study = study_of(parse(stage.argv(tmp_path, 1))[1])
    assert (study.task.expert, study.n) == ("stand" if stage.name == "stand" else "walk-1", 20)
    assert notes(study) == ""
    assert not any(tmp_path.iterdir())
