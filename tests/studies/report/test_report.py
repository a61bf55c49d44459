"""Test that a report shows the content of its records and is one self-contained page."""

import base64
import re

import pytest

from studies.report.__main__ import main
from tests.studies.pages import read
from tests.studies.records import fresh, study, write_lines, write_study

pytestmark = pytest.mark.xdist_group("report")  # its fixtures are slow


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Return the folder of a report with figures."""
    folder = tmp_path_factory.mktemp("report")
    main([str(write_study(folder / "study", study())), "--out", str(folder / "out")])
    return folder / "out"


@pytest.fixture
def page(drawn):
    return read(drawn)


def test_the_leaderboard_has_every_variant_with_the_numbers_of_its_records(page):
    for variant in {record["variant"] for record in study()}:
        assert page.row(variant)
    # Values 3, 4.1, 5 against 5, 6, 7: t(0.975, 2) = 4.303 times sd / √3, of logarithms of ratios.
    _, lr, primary, median, ratio, _, wins, p, here, verdict, loss, _ = page.row("dopr-adamw")
    assert (primary, median, ratio) == ("4.0 ± 2.5", "4.100", "× 0.664 [0.530, 0.832]")
    assert here == ratio  # their learning rates are equal
    assert (wins, p, verdict, loss, lr) == ("3/3", "0.016 *", "better", "0.40 ± 0.25", "0.01")
    assert "lower is better" in page.text


def test_stars_use_the_threshold_of_the_planned_comparisons(tmp_path, monkeypatch):
    monkeypatch.setattr("studies.report.report.draw", lambda records: {})
    folder, out = write_study(tmp_path / "study", study()), tmp_path / "out"
    assert main([str(folder), "--out", str(out), "--comparisons", "71"]) == 0
    page = read(out)
    assert page.row("dopr-adamw")[7] == "0.016"  # no star: above 0.05 / 71
    assert "0.000704" in page.text


def test_the_page_compares_pairs_of_bases_at_equal_validation(tmp_path, report):
    others = [*fresh("sgd", [9.0, 9.5, 9.9]), *fresh("signum", [7.0, 6.0, 8.0])]
    page = report(write_study(tmp_path / "many", [*study(), *others]))
    assert "Two base optimizers differ by up to × 1.0" in page.text
    assert page.row("adamw / muon")
    assert "rollout error is 1.00" in page.text  # tau: validation is a tenth of the error


def test_the_page_shows_each_optimizer_at_its_own_temperature(tmp_path, report):
    folder = write_study(tmp_path / "study", study())
    rows = [each for each in study() if each["role"] == "fresh" and each["base"] == "adamw"]
    own = [each | {"temperature": 0.5} for each in rows]
    equal = [each | {"role": "control"} for each in own if each["variant"] == "adamw"]
    write_lines(folder / "temperature.jsonl", [*own, *equal])
    page, ratio = report(folder), "× 0.664 [0.530, 0.832]"
    found = [row for row in page.rows if row[:2] == ["dopr-adamw", "0.5"]]
    assert found == [["dopr-adamw", "0.5", "4.0 ± 2.5", ratio, ratio]]
    assert ["optimizer", "temperature", "accumulated KL (nats)"] in [row[:3] for row in page.rows]
    assert "own temperature" not in report(write_study(tmp_path / "without", study())).text


def test_an_unclear_comparison_is_called_so_and_no_optimizer_is_marked_as_best(page):
    assert page.row("dopr-muon")[9] == "unclear"
    assert "(best)" not in page.text


def test_an_optimizer_that_beats_all_others_is_marked_as_best(tmp_path, report):
    rows = [*fresh("adamw", [5.0, 6.0, 7.0]), *fresh("dopr-adamw", [3.0, 4.1, 5.0])]
    page = report(write_study(tmp_path / "study", rows))
    assert [row[0] for row in page.rows if "(best)" in row[0]] == ["dopr-adamw (best)"]
    assert "No comparison at equal validation" in page.text  # because there is one base


def test_lower_values_are_worse_if_higher_is_better(tmp_path, report):
    values = {"adamw": [0.5, 0.6, 0.7], "dopr-adamw": [0.3, 0.41, 0.5]}
    rows = [run for name in values for run in fresh(name, values[name], higher_is_better=True)]
    page = report(write_study(tmp_path / "study", rows))
    assert page.row("dopr-adamw")[9] == "worse"


def test_references_are_below_the_optimizers_and_have_no_comparison(tmp_path, report):
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
    assert page.row("fast-dopr-adamw")[9] == "diverged 1/3"  # without another verdict
    assert ": dopr-adamw 0.02." in page.text  # the rate at which a tuning run diverged


def test_a_variant_without_finished_runs_is_listed(tmp_path, report):
    rows = [*fresh("adamw", [5.0, 6.0, 7.0]), *fresh("dopr-adamw", [None, None, None])]
    page = report(write_study(tmp_path / "study", rows))
    assert (page.row("dopr-adamw")[2], page.row("dopr-adamw")[9]) == ("–", "diverged 3/3")
    page = report(write_study(tmp_path / "all", fresh("adamw", [None, None, None])))
    assert "3 fresh runs diverged or missing" in page.text


def test_a_metric_says_how_many_runs_have_it(tmp_path, report):
    rows = study()
    rows[0]["grade"]["metrics"]["val_kl"]["mean"] = None
    page = report(write_study(tmp_path / "study", rows))
    assert any(row[0] == "adamw" and "(2 of 3 runs)" in " ".join(row) for row in page.rows)


def test_the_text_of_samples_is_escaped(tmp_path, report):
    evil = "</pre><script>alert(1)</script><img src=http://x.y/z> {{ 7 * 7 }}"
    rows = study()
    for record in rows[3:6]:
        record["grade"]["samples"] = [{"data": "0 1", "own": evil, "prompt": evil}]
    page = report(write_study(tmp_path / "study", rows))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) == 2  # as own text and as prompt


def test_the_page_refers_to_no_other_file(page):
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    links = [attributes.get("href") or "#" for _, attributes in page.tags]
    assert all(link.startswith("#") for link in links)
    assert "url(" not in page.text  # in the style sheet
    assert "@import" not in page.text
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3
    for image in images:
        kind, content = image.split(",")
        drawing = base64.b64decode(content).decode()
        assert kind == "data:image/svg+xml;base64"
        assert set(re.findall(r'href="(.)', drawing)) == {"#"}


def test_the_same_records_give_the_same_page_and_figures(drawn, tmp_path, capsys):
    assert main([str(write_study(tmp_path / "study", study())), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    names = {path.name.split("-")[-1] for path in drawn.glob("*.png")}
    assert names == {"curves.png", "sweeps.png", "validation.png"}
    for path in drawn.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_the_page_has_the_commands_and_environments_of_all_runs(page):
    assert "python -m studies.sweep.compare --task pdfa" in page.text
    assert "torch 2.13.0, git abc1234 (21 runs)" in page.text
    assert "episodes 8, seed 0" in page.text
    commands = [row[-1] for row in page.rows if row[-1].startswith("python train.py")]
    assert len(commands) == len(study())


def test_the_page_says_whether_all_optimizers_were_graded_on_the_same_episodes(tmp_path, report):
    rows = study()
    page = report(write_study(tmp_path / "same", rows))
    assert "graded on the same episodes" in page.text
    rows[0]["grade"]["samples"] = [{"data": "1 1", "own": "0 2"}]
    page = report(write_study(tmp_path / "other", rows))
    assert "some seeds were graded on different episodes" in page.text


def test_unfinished_episodes_are_counted(page):
    assert [row[1:] for row in page.rows if row[0] == "muon" and "8" in row] == [list("8864")]
