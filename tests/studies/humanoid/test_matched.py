"""Test that the comparison at equal validation loss interpolates the base, seed by seed."""

import json

import numpy as np
import pytest

from studies import rows
from studies.humanoid import matched
from studies.humanoid.matched import (
    FRESH_SEEDS,
    METRICS,
    STEPS,
    Setup,
    difference,
    key_of,
    main,
    measure,
    pooled,
    pooled_lines,
    table_of,
)
from studies.sweep.variants import FAST_PREFIX

LOSSES = (1e-3, 1e-4, 1e-5)


def row(variant, steps, loss, returns):
    """Return a row whose metrics are `returns` on every seed, and 0 where nothing is given."""
    values = {key: [0.0] * FRESH_SEEDS for key in METRICS}
    values |= {"val_loss": np.broadcast_to(loss, FRESH_SEEDS).tolist()}
    values |= {"return": np.broadcast_to(returns, FRESH_SEEDS).tolist()}
    return {"expert": "walk-1", "variant": variant, "steps": steps, "lr": 1e-3} | values


@pytest.fixture
def bases():
    """Return runs whose return grows by 1,000 with every factor of 10 of the loss, by the seed."""
    seeds = np.arange(FRESH_SEEDS)
    return [
        row("adamw", steps, loss * (1 + seeds), 1000 * i + seeds)
        for i, (steps, loss) in enumerate(zip((500, 1000, 2000), LOSSES, strict=True))
    ]


def test_the_base_is_interpolated_in_the_logarithm_of_the_loss_of_its_seed(bases):
    seeds = np.arange(FRESH_SEEDS)
    own = row(FAST_PREFIX + "adamw", 500, 10**-4.5 * (1 + seeds), 1500 + seeds + 7)
    np.testing.assert_allclose(difference(own, bases, "return"), 7)
    at_a_run = row(FAST_PREFIX + "adamw", 500, LOSSES[1] * (1 + seeds), 1000 + seeds)
    np.testing.assert_allclose(difference(at_a_run, bases[::-1], "return"), 0, atol=1e-9)


def test_a_loss_outside_the_range_of_the_base_has_no_difference(bases):
    seeds = np.arange(FRESH_SEEDS)
    for loss in (0.9 * LOSSES[-1], 1.1 * LOSSES[0]):
        own = row(FAST_PREFIX + "adamw", 500, loss * (1 + seeds), 0)
        assert np.isnan(difference(own, bases, "return")).all()
    found = pooled([own], bases, "return")
    assert found.n == 0
    assert np.isnan(found.mean)


def test_seeds_are_averaged_over_the_numbers_of_steps_in_range(bases):
    seeds = np.arange(FRESH_SEEDS)
    inside = row(FAST_PREFIX + "adamw", 500, LOSSES[1] * (1 + seeds), 1000 + 2 * seeds)
    partly = row(FAST_PREFIX + "adamw", 1000, LOSSES[2] * (1 + seeds), 2000 + seeds + 4)
    partly["val_loss"][0] = 1e-9
    found = pooled([inside, partly], bases, "return")
    expected = [0, *((seeds[1:] + 4) / 2)]
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.n == FRESH_SEEDS
    half = 2.3646 * np.std(expected, ddof=1) / np.sqrt(FRESH_SEEDS)  # t(7), 95 %
    assert found.hi - found.mean == pytest.approx(half, rel=1e-3)
    all_rows = [*bases, inside, partly]
    assert f"{found.mean:+,.0f} ± " in pooled_lines(all_rows)[0]
    assert "| 7 | +4 ± 0 |" in table_of(all_rows)


def test_a_setup_is_tuned_on_one_episode_and_graded_on_the_fresh_seeds(monkeypatch):
    seen = []

    def run_trial(trial):
        seen.append((trial.role, trial.n, trial.seed))
        curves = {"survival": {"mean": [1.0, 0.5]}}
        found = grade(trial.seed) | {"curves": curves}
        return {"val_loss": abs(np.log(trial.lr / 1e-3)), "grade": found}

    monkeypatch.setattr(matched, "run_trial", run_trial)
    found = measure(Setup("walk-2", "adamw", 500))
    assert found["lr"] == 1e-3
    assert found["return"] == [200 + i for i in range(FRESH_SEEDS)]
    assert found["survival"] == [1.0, 0.5]
    assert {each for each in seen if each[0] == "tuning"} == {("tuning", 1, 0)}
    assert [each[1:] for each in seen if each[0] == "fresh"] == [(20, s) for s in found["return"]]


def test_other_rates_are_a_base_of_their_own(bases):
    """At half of the rate, this base has 100 more at the same losses."""
    seeds = np.arange(FRESH_SEEDS)
    own = row(FAST_PREFIX + "adamw", 500, LOSSES[1] * (1 + seeds), 1250 + seeds)
    slower = [
        base | {"rate_factor": 0.5, "return": [each + 100 for each in base["return"]]}
        for base in bases
    ]
    tuned, half = pooled_lines([*bases, *slower, own])
    assert tuned == "walk-1, fast-dopr-adamw at equal loss, 8 seeds: +250 ± 0, falls +0.00 ± 0.00"
    assert "(base at 0.5 of its rate), 8 seeds: +150 ± 0" in half


def test_a_rate_factor_multiplies_the_tuned_rate_of_the_base(monkeypatch, tmp_path):
    seen = []

    def measured(setup):
        seen.append(setup)
        return row(setup.variant, setup.steps, 1e-3, 0) | {"rate_factor": setup.rate_factor}

    monkeypatch.setattr(rows, "iterate_in_pool", lambda _, setups, __: map(measured, setups))
    command = ["matched", "--out", str(tmp_path / "f.json"), "--experts", "walk-1"]
    monkeypatch.setattr("sys.argv", [*command, "--rate_factor", "0.5"])
    main()
    assert seen == [Setup("walk-1", "adamw", steps, 0.5) for steps in STEPS[False]]
    monkeypatch.setattr(matched, "sweep", lambda *_: 4e-3)
    monkeypatch.setattr(matched, "run_trial", lambda trial: {"grade": grade(trial.lr)})
    found = measure(seen[0])
    assert found["lr"] == found["return"][0] == 2e-3
    assert key_of(found) == seen[0]


def grade(value):
    """Return a grade whose metrics all have this value."""
    metrics = {key: {"mean": value} for key in METRICS}
    return {"metrics": metrics, "curves": {"survival": {"mean": [1.0]}}}


def test_rows_of_earlier_commands_are_kept(monkeypatch, tmp_path, capsys):
    def measured(setup):
        return row(setup.variant, setup.steps, 1 / setup.steps, 3) | {"expert": setup.expert}

    monkeypatch.setattr(rows, "iterate_in_pool", lambda _, setups, __: map(measured, setups))
    file = tmp_path / "results.json"
    for expert in ("walk-0", "walk-1"):
        command = ["matched", "--out", str(file), "--experts", expert]
        monkeypatch.setattr("sys.argv", command)
        main()
    found = json.loads(file.read_text())["rows"]
    assert len(found) == 2 * (len(STEPS[False]) + len(STEPS[True]))
    assert capsys.readouterr().out.count("at equal loss, 8 seeds:") == 1 + 2


def test_a_setting_that_clones_do_not_have_is_refused_before_any_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rows, "iterate_in_pool", None)
    command = ["matched", "--out", str(tmp_path / "f.json"), "--optimizers", "adamw+beta1=0.8"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "task humanoid has no setting beta1" in capsys.readouterr().err


def test_the_rows_of_a_file_can_be_shown_without_runs(bases, monkeypatch, tmp_path, capsys):
    seeds = np.arange(FRESH_SEEDS)
    own = row(FAST_PREFIX + "adamw", 500, LOSSES[1] * (1 + seeds), 1000 + seeds + 9)
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": [*bases, own]}))
    before = file.read_bytes()
    for longest, shown in (("2000", ": +9 ± 0, "), ("500", "0 seeds: ,")):
        command = ["matched", "--out", str(file), "--show", "--longest", longest]
        monkeypatch.setattr("sys.argv", command)
        main()
        assert shown in capsys.readouterr().out
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate_factor", "-1"], "--rate_factor -1: must be above 0"),
        (["--longest", "499"], "--longest 499: the shortest runs have 500 steps"),
        (["--show"], "there is no such file to show"),
    ],
)
def test_wrong_arguments_are_refused_before_any_run(words, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rows, "iterate_in_pool", None)
    monkeypatch.setattr("sys.argv", ["matched", "--out", str(tmp_path / "absent.json"), *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err


def test_the_table_has_the_runs_at_the_tuned_rates_alone(bases):
    slower = [base | {"rate_factor": 0.5, "lr": 7e-4} for base in bases]
    assert table_of([*bases, *slower]) == table_of(bases)
