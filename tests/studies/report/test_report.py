"""The page says what the records say, all of it, and needs nothing but itself."""

import base64
import json
import re

import pytest

from studies.report.__main__ import main
from tests.studies.pages import read
from tests.studies.small_studies import fresh, study, write_study


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of a whole report."""
    folder = tmp_path_factory.mktemp("report")
    main([str(write_study(folder / "study", study())), "--out", str(folder / "out")])
    return folder / "out"


@pytest.fixture
def page(drawn):
    return read(drawn)


def test_the_leaderboard_holds_every_variant_with_the_numbers_of_the_records(page):
    for variant in {record["variant"] for record in study()}:
        assert page.row(variant)
    # Values 3, 4.1, 5 against 5, 6, 7: t(0.975, 2) = 4.303 times sd / √3, of logarithms of ratios.
    _, lr, primary, median, ratio, _, wins, p, here, verdict, loss, _ = page.row("dopr-adamw")
    assert (primary, median, ratio) == ("4.0 ± 2.5", "4.100", "× 0.664 [0.530, 0.832]")
    assert here == ratio  # their learning rates are equal
    assert (wins, p, verdict, loss, lr) == ("3/3", "0.016 *", "better", "0.40 ± 0.25", "0.01")
    assert "lower is better" in page.text


def test_stars_are_those_of_the_planned_comparisons_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("studies.report.report.draw", lambda records: {})
    folder, out = write_study(tmp_path / "study", study()), tmp_path / "out"
    assert main([str(folder), "--out", str(out), "--comparisons", "71"]) == 0
    page = read(out)
    assert page.row("dopr-adamw")[7] == "0.016"  # no star: above 0.05 / 71
    assert "below 0.000704, which is 0.05 divided by the number of comparisons, 71" in page.text


def test_the_page_says_what_a_factor_at_equal_validation_has_to_exceed(tmp_path, report):
    others = [*fresh("sgd", [9.0, 9.5, 9.9]), *fresh("signum", [7.0, 6.0, 8.0])]
    page = report(write_study(tmp_path / "many", [*study(), *others]))
    assert "Two base optimizers differ by up to × 1.0" in page.text
    assert page.row("adamw / muon")
    assert "rollout error is 1.00" in page.text  # tau: validation is a tenth of the error here


def test_the_page_has_each_optimizer_at_its_own_temperature(tmp_path, report):
    folder = write_study(tmp_path / "study", study())
    rows = [each for each in study() if each["role"] == "fresh" and each["base"] == "adamw"]
    own = [each | {"temperature": 0.5} for each in rows]
    alike = [each | {"role": "control"} for each in own if each["variant"] == "adamw"]
    path = folder / "temperature.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in [*own, *alike]))
    page = report(folder)
    assert "At each optimizer’s own temperature" in page.text
    ratio = "× 0.664 [0.530, 0.832]"
    found = [row for row in page.rows if row[0] == "dopr-adamw" and row[1] == "0.5"]
    assert found == [["dopr-adamw", "0.5", "4.0 ± 2.5", ratio, ratio]]
    assert ["optimizer", "temperature", "accumulated KL (nats)"] in [row[:3] for row in page.rows]
    assert "own temperature" not in report(write_study(tmp_path / "without", study())).text


def test_temperatures_of_models_that_were_trained_again_are_refused(tmp_path, capsys):
    folder, path = (
        write_study(tmp_path / "study", study()),
        tmp_path / "study" / "temperature.jsonl",
    )
    path.write_text(json.dumps(study()[0] | {"temperature": 0.5, "lr": 0.04}) + "\n")
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "adamw is not the model of records.jsonl; run `python" in capsys.readouterr().err
    for line, message in (("{}", "record 1 lacks spec"), (json.dumps(study()[0]), "temperature")):
        path.write_text(line)
        assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    path.write_text("{")
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "temperature.jsonl: expected one JSON record per line" in capsys.readouterr().err


def test_with_one_base_the_page_says_why_there_is_no_table(tmp_path, report):
    rows = [*fresh("adamw", [5.0, 6.0, 7.0]), *fresh("dopr-adamw", [3.0, 4.1, 5.0])]
    page = report(write_study(tmp_path / "study", rows))
    assert "No comparison at equal validation" in page.text


def test_what_is_not_told_apart_is_called_so_and_nothing_is_marked_as_best(page):
    assert page.row("dopr-muon")[9] == "unclear"
    assert "No optimizer is marked as best" in page.text
    assert "(best)" not in page.text


def test_the_best_is_marked_where_every_paired_interval_excludes_zero(tmp_path, report):
    rows = [*fresh("adamw", [5.0, 6.0, 7.0]), *fresh("dopr-adamw", [3.0, 4.1, 5.0])]
    page = report(write_study(tmp_path / "study", rows))
    assert [row[0] for row in page.rows if "(best)" in row[0]] == ["dopr-adamw (best)"]


def test_where_higher_is_better_the_same_numbers_are_worse(tmp_path, report):
    values = {"adamw": [0.5, 0.6, 0.7], "dopr-adamw": [0.3, 0.41, 0.5]}
    rows = [
        each | {"higher_is_better": True} for name in values for each in fresh(name, values[name])
    ]
    page = report(write_study(tmp_path / "study", rows))
    assert page.row("dopr-adamw")[9] == "worse"


def test_references_stand_below_the_optimizers_and_are_compared_with_nothing(tmp_path, report):
    rows = [record | {"role": "reference"} for record in fresh("oracle", [0.0, 0.0, 0.0])]
    page = report(write_study(tmp_path / "study", [*study(), *rows]))
    oracle = page.row("oracle, the source itself")
    assert oracle[2:9] == ["0", "", "", "", "", "", ""]
    assert page.rows.index(oracle) > page.rows.index(page.row("fast-dopr-adamw"))


def test_diverged_and_missing_runs_are_listed(tmp_path, report):
    absent = [record for record in study() if record["variant"] != "muon" or record["seed"] != 102]
    page = report(write_study(tmp_path / "study", absent))
    assert "2 fresh runs diverged or missing" in page.text
    assert "fast-dopr-adamw, lr 0.01, seed 101 (fresh): diverged" in page.text
    assert "muon, seed 102 (fresh): missing" in page.text
    assert page.row("fast-dopr-adamw")[9] == "diverged 1/3"  # once, and no other verdict
    assert ": dopr-adamw 0.02." in page.text


def test_a_variant_of_which_nothing_finished_is_shown(tmp_path, report):
    rows = [*fresh("adamw", [5.0, 6.0, 7.0]), *fresh("dopr-adamw", [None, None, None])]
    page = report(write_study(tmp_path / "study", rows))
    assert (page.row("dopr-adamw")[2], page.row("dopr-adamw")[9]) == ("–", "diverged 3/3")


def test_a_study_of_which_nothing_finished_makes_a_page(tmp_path, report):
    page = report(write_study(tmp_path / "study", fresh("adamw", [None, None, None])))
    assert "3 fresh runs diverged or missing" in page.text


def test_a_metric_that_some_runs_lack_says_so(tmp_path, report):
    rows = study()
    rows[0]["grade"]["metrics"]["val_kl"]["mean"] = None
    page = report(write_study(tmp_path / "study", rows))
    assert any(row[0] == "adamw" and "(2 of 3 runs)" in " ".join(row) for row in page.rows)


def test_text_of_samples_is_escaped(tmp_path, report):
    evil = "</pre><script>alert(1)</script><img src=http://x.y/z> {{ 7 * 7 }}"
    rows = study()
    for record in rows[3:6]:
        record["grade"]["samples"] = [{"data": "0 1", "own": evil, "prompt": evil}]
    page = report(write_study(tmp_path / "study", rows))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) == 2  # read back as it was


def test_the_page_needs_nothing_but_itself(page):
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    links = [attributes.get("href") or "#" for _, attributes in page.tags]
    assert all(link.startswith("#") for link in links)
    assert "url(" not in page.text  # of the style sheet
    assert "@import" not in page.text
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3
    for image in images:
        kind, content = image.split(",")
        drawing = base64.b64decode(content).decode()
        assert kind == "data:image/svg+xml;base64"
        assert set(re.findall(r'href="(.)', drawing)) == {"#"}


def test_the_figures_lie_beside_the_page_and_the_same_records_make_the_same_page(
    drawn, tmp_path, capsys
):
    assert main([str(write_study(tmp_path / "study", study())), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    names = {path.name.split("-")[-1] for path in drawn.glob("*.png")}
    assert names == {"curves.png", "sweeps.png", "validation.png"}
    for path in drawn.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_it_says_how_to_do_it_again(page):
    for text in (
        "python -m studies.sweep.compare --task pdfa",
        "torch 2.13.0, git abc1234 (21 runs)",
    ):
        assert text in page.text
    assert "episodes 8, seed 0" in page.text
    commands = [row[-1] for row in page.rows if row[-1].startswith("python train.py")]
    assert len(commands) == len(study())


def test_episodes_that_differ_between_optimizers_are_noticed(tmp_path, report):
    rows = study()
    page = report(write_study(tmp_path / "same", rows))
    assert "graded on the same episodes" in page.text
    rows[0]["grade"]["samples"] = [{"data": "1 1", "own": "0 2"}]
    page = report(write_study(tmp_path / "other", rows))
    assert "some seeds were graded on different episodes" in page.text


def test_episodes_still_under_way_are_counted(page):
    assert [row[1:] for row in page.rows if row[0] == "muon" and "8" in row] == [list("8864")]
