"""The stages of the width study are commands that could begin, and are run as asked."""

import pytest

from studies.mup import all_stages as width_study
from studies.mup.all_stages import STAGES, main
from studies.mup.coordinates import measure_coordinates
from studies.mup.grid import grid


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_is_a_grid_that_could_begin(stage, tmp_path):
    _, arguments = stage.command.parse(stage.argv(tmp_path, 2))
    arguments.seeds = arguments.seeds[:1]
    points = grid(arguments, {}, measure_coordinates)
    kinds = len(arguments.parametrisations)
    cells = kinds * len(arguments.widths) - (kinds == 2 and 256 in arguments.widths)  # one for both
    wanted = cells * len(arguments.optimizers) * len(arguments.octaves)
    assert len({point.folder for point in points}) == wanted


def test_stages_of_one_folder_are_runs_of_their_own(tmp_path):
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    runs = []
    for stage in STAGES:
        _, arguments = stage.command.parse(stage.argv(tmp_path, 2))
        runs += [point.folder for point in grid(arguments, {}, measure_coordinates)]
    assert len({*runs}) == len(runs)


def test_prefixes_choose_stages_and_data_are_prepared_once(tmp_path, monkeypatch):
    calls = []
    prepare = width_study.data.pystdlib.prepare
    monkeypatch.setattr(prepare, "main", lambda argv: calls.append("prepare"))
    for command in {stage.command for stage in STAGES}:
        monkeypatch.setattr(command, "main", lambda argv: calls.append(argv[1]))
    main(["decay", "raw", "--out", str(tmp_path)])
    assert calls[0] == "prepare"
    assert [optimizers.split(",")[0] for optimizers in calls[1:]] == [
        "adamw+wd_scaling=independent",
        "dopr-sgd+trace_normalized=false",
    ]


def test_an_unknown_stage_is_an_error_before_any_run(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["widths", "--out", str(tmp_path)])
    assert "no stage begins with widths" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
