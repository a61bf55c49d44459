"""Test studies that consist of several commands."""

from pathlib import Path

import pytest

from studies.mup import all_stages as width_study
from studies.mup.coordinates import measure_coordinates
from studies.mup.grid import grid
from studies.rollout import all_stages as rollout_study
from studies.rollout.all_stages import ABLATIONS, STAGES, planned
from studies.sweep.compare import parse, study_of


@pytest.fixture
def calls(monkeypatch):
    """Replace the commands that compare optimizers and write reports; return their arguments."""
    made = {"compare": [], "report": []}

    def compare(argv):
        made["compare"].append(argv)
        folder = study_of(parse(argv)[1]).out
        folder.mkdir(parents=True)
        (folder / "records.jsonl").touch()

    monkeypatch.setattr(rollout_study.compare, "main", compare)
    monkeypatch.setattr(rollout_study.report, "main", made["report"].append)
    return made


@pytest.mark.parametrize("stage", STAGES + ABLATIONS, ids=lambda stage: stage.name)
def test_compare_accepts_every_stage_of_the_rollout_study(stage, tmp_path):
    study = study_of(parse(stage.argv(tmp_path, 2))[1])
    assert (study.steps, study.fresh_seeds) == (stage.steps, stage.seeds)
    assert len(study.variants) == len(stage.optimizers)
    assert {variant.base for variant in study.variants} <= {each.name for each in study.variants}


def grid_of(stage, out):
    return grid(stage.command.parse(stage.argv(out, 2))[1], {}, measure_coordinates)


@pytest.mark.parametrize("stage", width_study.STAGES, ids=lambda stage: stage.name)
def test_the_grid_commands_accept_every_stage_of_the_width_study(stage, tmp_path):
    _, arguments = stage.command.parse(stage.argv(tmp_path, 2))
    kinds = len(arguments.parametrisations)
    cells = kinds * len(arguments.widths) - (kinds == 2 and 256 in arguments.widths)  # base width
    n_runs = cells * len(arguments.optimizers) * len(arguments.octaves) * len(arguments.seeds)
    assert len(grid_of(stage, tmp_path)) == n_runs


@pytest.mark.parametrize("stages", [STAGES + ABLATIONS, width_study.STAGES], ids=["rollout", "mup"])
def test_no_two_stages_have_the_same_name(stages):
    assert len({stage.name for stage in stages}) == len(stages)


def test_no_two_runs_of_the_width_study_share_a_folder():
    folders = [run.folder for each in width_study.STAGES for run in grid_of(each, Path("out"))]
    assert len({*folders}) == len(folders)


def test_prefixes_select_stages_and_pages_contain_only_stages_with_records(tmp_path, calls):
    (tmp_path / "nav-500").mkdir()  # a stage that was stopped before it wrote records
    rollout_study.main(["ctrl-500", "ablations-pdfa", "--out", str(tmp_path)])
    assert [argv[1] for argv in calls["compare"]] == ["ctrl", "pdfa"]
    folders = [report[: report.index("--out")] for report in calls["report"]]
    assert folders == [[str(tmp_path / "ctrl-500")], [str(tmp_path / "ablations-pdfa-500")]]


def test_the_width_study_prepares_its_data_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(width_study.data.pystdlib.prepare, "main", made.append)
    for command in {stage.command for stage in width_study.STAGES}:
        monkeypatch.setattr(command, "main", made.append)
    width_study.main(["decay", "raw", "--out", str(tmp_path)])
    prepared, *commands = made
    assert prepared[:2] == ["--tokenizer", "byte"]
    names = [argv[1].split(",")[0] for argv in commands]
    assert names == ["adamw+wd_scaling=independent", "dopr-sgd+trace_normalized=false"]


def test_the_family_counts_all_planned_comparisons_even_if_few_stages_ran(tmp_path, calls):
    assert planned(STAGES) == (5 * 2 + 2 * 2) * 4 + 15
    rollout_study.main(["ctrl-500", "--out", str(tmp_path)])
    (arguments,) = calls["report"]
    assert arguments[-2:] == ["--comparisons", "71"]


@pytest.mark.parametrize("study", [rollout_study, width_study])
def test_an_unknown_stage_is_refused_before_any_run(study, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        study.main(["gridworld", "--out", str(tmp_path)])
    assert "no stage begins with gridworld" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_mistyped_stage_beside_a_valid_one_is_refused_before_any_run(tmp_path, calls, capsys):
    with pytest.raises(SystemExit, match="2"):
        rollout_study.main(["ctrl-500", "crtl-1500", "--out", str(tmp_path)])
    assert "no stage begins with crtl-1500; there are" in capsys.readouterr().err
    assert not calls["compare"]
