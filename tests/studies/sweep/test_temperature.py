"""Test the comparison at each optimizer's own temperature."""

import math

import numpy as np
import pytest
import torch

from eval.rollout.policy import Predictor
from studies.stats.records import AnalysisError
from studies.stats.temperatures import ranked
from studies.sweep import compare, temperature
from studies.sweep.temperature import (
    TemperedPredictor,
    best_temperature,
    controls,
    regrade,
    table,
)
from studies.sweep.trial import run_trial
from tests.studies.records import SEEDS, fresh, graded, read_lines, write_lines, write_study
from trainer.checkpoint.read import CheckpointError

TINY = "pdfa,states=4,alphabet=4,horizon=8,n_documents=64"


class Fixed(Predictor):
    """Predict the same distribution for every input."""

    log_p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()

    def start(self, prompts, length=None):
        return self.log_p

    def read(self, tokens):
        return self.log_p


@pytest.mark.parametrize("T", [0.01, 0.5, 1.0, 2.0])
def test_a_temperature_raises_probabilities_to_a_power(T):
    tempered = TemperedPredictor(Fixed(), T)
    p = Fixed.log_p.exp() ** (1 / T)
    wanted = p / p.sum()
    for found in (tempered.start(torch.zeros(1, 1)), tempered.read(torch.zeros(1, 1))):
        torch.testing.assert_close(found.exp(), wanted, rtol=1e-9, atol=1e-30)


def test_the_temperature_with_the_lowest_error_on_the_tuning_seeds_is_chosen(monkeypatch, tmp_path):
    def regraded(study, record, T):  # the best temperatures are 0.8 on seed 0 and 1.0 on seed 1
        error = math.exp(2 * abs(T - 0.8) if record["seed"] == 0 else abs(T - 1))
        return graded("adamw", record["seed"], error)

    monkeypatch.setattr(temperature, "regrade", regraded)
    runs = [graded("adamw", seed, 1.0) for seed in (0, 1)]
    assert best_temperature(tmp_path, runs) == 0.8
    assert best_temperature(tmp_path, [*runs, graded("adamw", 2, None)]) == 1.0


def test_a_temperature_without_effect_is_not_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(temperature, "regrade", lambda study, record, T: record)
    assert best_temperature(tmp_path, [graded("sgd", seed, 1.0) for seed in (0, 1)]) == 1.0


def test_the_table_compares_at_temperature_one_and_at_the_chosen_temperatures():
    before = [*fresh("adamw", [4.0, 4.0, 4.0]), *fresh("dopr-adamw", [2.0, 2.0, 2.0])]
    after = [*fresh("adamw", [2.0, 2.0, 2.0], temperature=0.8)]
    after += fresh("dopr-adamw", [2.0, 2.0, 2.0], temperature=1.0)
    lines = table(before, after).splitlines()
    (row,) = [line for line in lines if line.startswith("| dopr-adamw")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["1", "2 ± 0", "2 ± 0"]
    assert [cell.split(" [")[0] for cell in cells[4:6]] == ["× 0.500", "× 1.00"]
    assert cells[6] == f"0/{len(SEEDS)}"


def test_a_base_is_graded_at_the_rate_and_temperature_of_each_variant(monkeypatch, tmp_path):
    monkeypatch.setattr(temperature, "regrade", lambda study, r, T: r | {"temperature": T})
    at_base = fresh("adamw", [4.0, 5.0, 6.0])
    at_twice = fresh("adamw", [2.0, 3.0, 3.0], role="control", lr=0.02)
    variants = [*fresh("dopr-adamw", [1.0, 2.0, 2.0], lr=0.02, temperature=0.5)]
    variants += fresh("fast-dopr-adamw", [1.0, 1.0, 1.0], lr=0.01, temperature=0.7)
    variants += fresh("dopr-muon", [1.0, 1.0, 1.0], temperature=0.7)  # without its base
    after = [*(r | {"temperature": 1.0} for r in at_base), *variants]
    found = controls(tmp_path, [*at_base, *at_twice], after)
    assert {(r["variant"], r["role"], r["lr"], r["temperature"]) for r in found} == {
        ("adamw", "control", 0.01, 0.7),
        ("adamw", "control", 0.02, 0.5),
    }
    equal = {each.row.variant: each.all_else_equal for each in ranked([*after, *found])}
    assert {name for name, each in equal.items() if each} == {"dopr-adamw", "fast-dopr-adamw"}
    ratio = np.log([1 / 2, 2 / 3, 2 / 3]).mean()  # relative to `at_twice`
    assert equal["dopr-adamw"].difference.mean == pytest.approx(ratio)
    text = table(at_base + variants, after + found)
    assert "| adamw | 1 |" in text  # its own temperature, and not that of a control
    last = [line.split("|")[-2].strip() for line in text.splitlines()]
    assert [cell.split(" [")[0] for cell in last if cell.startswith("×")] == ["× 0.203", "× 0.606"]


def test_trained_models_are_graded_once_at_each_temperature(tmp_path, capsys):
    out = tmp_path / "study"
    command = f"--task {TINY} --optimizers adamw --steps 10 --episodes 16 --out {out}"
    study = compare.study_of(compare.parse(command.split())[1])
    seeds = {"tuning": (0,), "fresh": (200, 201)}
    trials = [study.trial(study.variants[0], role, 1e-2, s) for role in seeds for s in seeds[role]]
    write_lines(out / "records.jsonl", [run_trial(trial) for trial in trials])
    temperature.main([str(out)])
    assert [row["seed"] for row in read_lines(out / "temperature.jsonl")] == [200, 201]
    stored = sorted((out / "runs").glob("*/temperature/*.json"))
    written = [path.stat().st_mtime_ns for path in stored]
    temperature.main([str(out)])
    assert stored
    assert [path.stat().st_mtime_ns for path in stored] == written
    assert "2 runs at their optimizer's temperature" in capsys.readouterr().out
    row = read_lines(out / "records.jsonl")[0]
    hot, cold = (regrade(out, row, T)["grade"]["metrics"] for T in (1.4, 0.5))
    assert cold["overconfidence"]["mean"] > hot["overconfidence"]["mean"]
    for role in ("control", row["role"]):  # the stored grade serves records of both roles
        assert regrade(out, row | {"role": role}, 0.5)["role"] == role
    other_code = row | {"grading": row["grading"] | {"code": "of another revision"}}
    assert regrade(out, other_code, 1.0)["grading"] == row["grading"]
    other_model = row | {"grading": row["grading"] | {"checkpoint": "x"}}
    with pytest.raises(CheckpointError, match="is not the model of the study's record"):
        regrade(out, other_model, 0.9)
    stored[0].write_text("{")
    with pytest.raises(AnalysisError, match=f"{stored[0].name}: Invalid JSON"):
        temperature.at_best_temperatures(out, read_lines(out / "records.jsonl"))


def test_folders_without_models_or_without_a_study_of_sampled_rollouts_are_refused(
    tmp_path, capsys
):
    runs = [graded("adamw", 0, 1.0, role="tuning"), *fresh("adamw", [1.0, 2.0, 3.0])]
    lds = [{**each, "task": "lds"} for each in runs]
    for name, rows, message in (("a", runs, "no checkpoint"), ("b", lds, "not a study of sampled")):
        folder = write_study(tmp_path / name, rows)
        with pytest.raises(SystemExit, match="2"):
            temperature.main([str(folder)])
        assert message in capsys.readouterr().err
