"""The stages of the study are commands that studies.sweep.compare accepts, and are run as asked."""

import pytest

from studies.rollout import all_stages as rollout_study
from studies.rollout.all_stages import ABLATIONS, STAGES, main, planned
from studies.sweep.compare import parse, study_of


@pytest.fixture
def calls(monkeypatch):
    """What would have been compared and reported."""
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
def test_every_stage_is_a_study_that_could_begin(stage, tmp_path):
    study = study_of(parse(stage.argv(tmp_path, 2))[1])
    assert (study.steps, study.fresh_seeds) == (stage.steps, stage.seeds)
    assert len(study.variants) == len(stage.optimizers)
    bases = {variant.base for variant in study.variants}
    assert bases <= {variant.name for variant in study.variants}  # each has what it is paired with


def test_stages_have_folders_of_their_own():
    names = [stage.name for stage in STAGES + ABLATIONS]
    assert len({*names}) == len(names)


def test_prefixes_choose_stages_and_pages_show_what_is_there(tmp_path, calls):
    (tmp_path / "nav-500").mkdir()  # begun, and stopped
    main(["ctrl-500", "ablations-pdfa", "--out", str(tmp_path)])
    assert [argv[1] for argv in calls["compare"]] == ["ctrl", "pdfa"]
    folders = [report[: report.index("--out")] for report in calls["report"]]
    assert folders == [[str(tmp_path / "ctrl-500")], [str(tmp_path / "ablations-pdfa-500")]]


def test_the_family_is_what_the_log_fixes_whatever_stages_were_run(tmp_path, calls):
    assert planned(STAGES) == (5 * 2 + 2 * 2) * 4 + 15
    main(["ctrl-500", "--out", str(tmp_path)])
    (arguments,) = calls["report"]
    assert arguments[-2:] == ["--comparisons", "71"]


def test_an_unknown_stage_is_an_error_before_any_run(tmp_path, calls, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["gridworld", "--out", str(tmp_path)])
    assert "no stage begins with gridworld" in capsys.readouterr().err
    assert calls["compare"] == []
