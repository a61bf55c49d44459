"""A comparison at each optimizer's own temperature, on models that were trained before."""

import json
import math

import numpy as np
import pytest
import torch

from eval.rollout.policy import Predictor
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
from tests.studies.small_studies import SEEDS, fresh, graded, write_study
from trainer.checkpoint.read import CheckpointError

TINY = "pdfa,states=4,alphabet=4,horizon=8,n_documents=64"


class Fixed(Predictor):
    """Says the same whatever it reads."""

    log_p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()

    def start(self, prompts, length=None):
        return self.log_p

    def read(self, tokens):
        return self.log_p


@pytest.mark.parametrize("T", [0.01, 0.5, 1.0, 2.0])
def test_a_temperature_is_a_power_of_the_probabilities(T):
    tempered = TemperedPredictor(Fixed(), T)
    p = Fixed.log_p.exp() ** (1 / T)
    wanted = p / p.sum()
    for found in (tempered.start(torch.zeros(1, 1)), tempered.read(torch.zeros(1, 1))):
        torch.testing.assert_close(found.exp(), wanted, rtol=1e-9, atol=1e-30)


def test_the_temperature_of_the_lowest_error_on_the_tuning_seeds_is_chosen(monkeypatch, tmp_path):
    def regraded(study, record, T):  # seed 0 wants 0.8, seed 1 rather 1.0
        error = math.exp(2 * abs(T - 0.8) if record["seed"] == 0 else abs(T - 1))
        return graded("adamw", record["seed"], error)

    monkeypatch.setattr(temperature, "regrade", regraded)
    runs = [graded("adamw", seed, 1.0) for seed in (0, 1)]
    assert best_temperature(tmp_path, runs) == 0.8
    assert best_temperature(tmp_path, [*runs, graded("adamw", 2, None)]) == 1.0


def test_where_a_temperature_changes_nothing_none_is_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(temperature, "regrade", lambda study, record, T: record)
    assert best_temperature(tmp_path, [graded("sgd", seed, 1.0) for seed in (0, 1)]) == 1.0


def test_the_table_compares_at_one_and_at_the_temperatures():
    before = [*fresh("adamw", [4.0, 4.0, 4.0]), *fresh("dopr-adamw", [2.0, 2.0, 2.0])]
    after = [*fresh("adamw", [2.0, 2.0, 2.0], temperature=0.8)]
    after += fresh("dopr-adamw", [2.0, 2.0, 2.0], temperature=1.0)
    lines = table(before, after).splitlines()
    (row,) = [line for line in lines if line.startswith("| dopr-adamw")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["1", "2 ± 0", "2 ± 0"]
    assert cells[4].startswith("× 0.5")
    assert cells[5].startswith("× 1")
    assert f"0/{len(SEEDS)}" in cells


def test_a_base_is_graded_at_the_rate_and_temperature_of_each_variant(monkeypatch, tmp_path):
    def regraded(study, record, T):
        return record | {"temperature": T}

    monkeypatch.setattr(temperature, "regrade", regraded)
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
    ratio = np.log([1 / 2, 2 / 3, 2 / 3]).mean()  # and not those to `at_base`
    assert equal["dopr-adamw"].difference.mean == pytest.approx(ratio)
    assert "| adamw | 1 |" in table(at_base + variants, after + found)  # not a control's 0.7
    last = [
        line.split("|")[-2].strip()
        for line in table(at_base + variants, after + found).splitlines()
    ]
    assert [cell.split(" [")[0] for cell in last if cell.startswith("×")] == ["× 0.203", "× 0.606"]


def test_trained_models_are_graded_at_their_temperature_once(tmp_path, capsys):
    out = tmp_path / "study"
    command = f"--task {TINY} --optimizers adamw --steps 10 --episodes 16 --out {out}"
    study = compare.study_of(compare.parse(command.split())[1])
    seeds = {"tuning": (0,), "fresh": (200, 201)}
    points = [study.trial(study.variants[0], role, 1e-2, s) for role in seeds for s in seeds[role]]
    lines = [json.dumps(run_trial(point)) + "\n" for point in points]
    (out / "records.jsonl").write_text("".join(lines))
    temperature.main([str(out)])
    rows = [json.loads(line) for line in (out / "temperature.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [200, 201]
    kept = sorted((out / "runs").glob("*/temperature/*.json"))
    stamps = [path.stat().st_mtime_ns for path in kept]
    temperature.main([str(out)])
    assert kept
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    assert "2 runs at their optimizer's temperature" in capsys.readouterr().out
    study_row = json.loads((out / "records.jsonl").read_text().splitlines()[0])
    hot, cold = (regrade(out, study_row, T)["grade"]["metrics"] for T in (1.4, 0.5))
    assert cold["overconfidence"]["mean"] > hot["overconfidence"]["mean"]
    assert regrade(out, study_row | {"role": "control"}, 0.5)["role"] == "control"  # and not kept
    assert regrade(out, study_row, 0.5)["role"] == study_row["role"]
    other = {"code": "of another revision"}
    again = regrade(out, study_row | {"grading": study_row["grading"] | other}, 1.0)
    assert again["grading"] == study_row["grading"]
    with pytest.raises(CheckpointError, match="is not the model of the study's record"):
        regrade(out, study_row | {"grading": study_row["grading"] | {"checkpoint": "x"}}, 0.9)


def test_folders_without_models_or_without_a_study_are_one_error(tmp_path, capsys):
    runs = [graded("adamw", 0, 1.0, role="tuning"), *fresh("adamw", [1.0, 2.0, 3.0])]
    lds = [{**each, "task": "lds"} for each in runs]
    for name, rows, message in (("a", runs, "no checkpoint"), ("b", lds, "not a study of sampled")):
        folder = write_study(tmp_path / name, rows)
        with pytest.raises(SystemExit) as exit:
            temperature.main([str(folder)])
        assert exit.value.code == 2
        assert message in capsys.readouterr().err
