"""Test sweeps, fresh seeds and the folder of a study."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from optim.build import MATRIX_OPTIMIZERS, OPTIMIZERS
from studies.sweep.compare import main, notes, study_of
from studies.sweep.compare import parse as parse_arguments
from studies.sweep.results import unite
from studies.sweep.run_cache import TrialError, differences, finished, read_record
from studies.sweep.study import FRESH, MAX_RATES, SweepError, search_rates, sweep
from studies.sweep.trial import run_trial
from studies.sweep.variants import parse_variant
from tests.studies.records import read_lines, record

ROOT = Path(__file__).parents[3]
TINY = "pdfa,states=4,alphabet=4,horizon=8,n_documents=64"


def study(tmp_path, *more, task="lds"):
    command = ["--task", task, "--optimizers", "adamw", "--out", str(tmp_path / "study"), *more]
    return study_of(parse_arguments(command)[1])


def swept(tmp_path, loss):
    """Sweep adamw with a function of the learning rate as its loss; return the best rate and all.

    A loss of None means that the run diverged.
    """
    tried = []

    def run(trials):
        tried.extend(trial.lr for trial in trials)
        return [{"val_loss": loss(trial.lr)} for trial in trials]

    return sweep(study(tmp_path), parse_variant("adamw"), run), tried


@pytest.mark.parametrize("best", [1e-4, 4e-3, 0.1])
def test_a_sweep_ends_with_the_best_rate_inside_the_grid(tmp_path, best):
    found, tried = swept(tmp_path, lambda lr: abs(math.log2(lr / best)))
    assert abs(math.log2(found / best)) <= 0.5
    assert min(tried) < found < max(tried)
    assert all(tried.count(lr) == 2 for lr in tried)  # once for each tuning seed


def test_a_rate_at_which_training_diverges_is_never_the_best(tmp_path):
    assert swept(tmp_path, lambda lr: None if lr > 3e-3 else 1 - lr)[0] == 2e-3


def test_lower_rates_are_tried_if_the_whole_grid_diverges(tmp_path):
    def loss(lr):
        return None if lr > 3e-4 else abs(math.log2(lr / 1e-4))

    assert swept(tmp_path, loss)[0] == 2e-3 / 16


@pytest.mark.parametrize("loss", [lambda lr: None, lambda lr: -lr], ids=["diverges", "falls"])
def test_a_sweep_without_a_best_rate_is_an_error(tmp_path, loss):
    with pytest.raises(SweepError, match="no best learning rate inside"):
        swept(tmp_path, loss)


def test_a_search_ends_if_every_rate_diverges():
    tried = []
    with pytest.raises(SweepError, match="adamw: no best learning rate inside"):
        search_rates(lambda lr: tried.append(lr) or math.inf, (1.0, 2.0), "adamw")
    assert len(tried) == MAX_RATES


def test_a_class_without_a_grid_is_named_and_swept_around_its_default_rate(tmp_path):
    assert notes(study(tmp_path)) == ""
    lion = study(tmp_path, "--optimizers", "lion")
    assert lion.first_rates(lion.variants[0]) == (5e-5, 1e-4, 2e-4)
    text = (
        "lion: has no grid of its own, so its sweep begins around its default, with 5e-05, 0.0001"
    )
    assert notes(lion).startswith(text)


def test_a_variant_without_its_base_is_named(tmp_path):
    text = notes(study(tmp_path, "--optimizers", "dopr-adamw,sgd"))
    assert text.startswith("dopr-adamw: adamw is not in this command")
    assert notes(study(tmp_path, "--optimizers", "dopr-adamw,adamw")) == ""


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_matrix_optimizers_share_one_rate_of_their_adamw(tmp_path, optimizer):
    trial = study(tmp_path, task="pdfa").trial(parse_variant(optimizer), "fresh", 0.5, 7)
    assert ("aux_lr" in trial.settings) == (optimizer in MATRIX_OPTIMIZERS)


def test_the_seed_of_a_run_is_also_the_instance_of_its_task(tmp_path):
    trial = study(tmp_path, task="pdfa,states=8").trial(parse_variant("dopr-muon"), "fresh", 0.5, 7)
    assert "instance=7" in trial.task.spec
    assert "states=8" in trial.task.spec
    assert {"--seed=7", "--lr=0.5", "--dopr=True", "--aux_lr=0.004"} <= set(trial.command)


def test_a_base_also_runs_at_each_rate_of_its_variants(tmp_path):
    names = "adamw,dopr-adamw,fast-dopr-adamw,dopr-adamw+gamma=1,dopr-sgd"
    rates = dict(zip(names.split(","), (0.1, 0.2, 0.1, 0.2, 0.3), strict=True))
    found = study(tmp_path, "--optimizers", names, "--seeds", "2").controls(rates)
    # Two variants share the rate 0.2, and the study does not contain sgd.
    assert [(each.variant, each.role, each.lr, each.seed) for each in found] == [
        ("adamw", "control", 0.2, FRESH + i) for i in range(2)
    ]
    assert "--dopr=False" in found[0].command


QUICK = ["--task", "lds", "--steps", "20", "--seeds", "2", "--tuning_seeds", "1"]


@pytest.fixture
def rates(monkeypatch):
    """Replace sweeps by one tuning run; the dict holds the best rates, None if there is none."""
    best = {"adamw": 1e-3, "dopr-adamw": 2e-3}

    def sweep(study, variant, run):
        run([study.trial(variant, "tuning", 1e-3, 0)])
        if best[variant.name] is None:
            raise SweepError("none")
        return best[variant.name]

    monkeypatch.setattr("studies.sweep.study.sweep", sweep)
    return best


@pytest.mark.usefixtures("synchronous")
@pytest.mark.parametrize(
    ("lost", "other"),
    [
        ("adamw", "dopr-adamw"),
        pytest.param("dopr-adamw", "adamw", marks=pytest.mark.slow),
    ],
)
def test_a_variant_without_a_best_rate_does_not_stop_the_others(
    tmp_path, rates, capsys, lost, other
):
    rates[lost] = None
    main([*QUICK, "--optimizers", "adamw,dopr-adamw", "--out", str(tmp_path)])
    rows = read_lines(tmp_path / "records.jsonl")
    assert [row["variant"] for row in rows if row["role"] == "fresh"] == [other] * 2
    assert f"{lost} has no fresh runs" in capsys.readouterr().out


@pytest.mark.usefixtures("synchronous")
def test_a_study_runs_fresh_seeds_and_controls_and_other_commands_extend_it(
    tmp_path, rates, capsys
):
    command = [*QUICK, "--out", str(tmp_path)]
    main([*command, "--optimizers", "adamw"])
    first = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" s")]
    main([*command, "--optimizers", "adamw,dopr-adamw", "--seeds", "3"])
    rows = read_lines(tmp_path / "records.jsonl")
    keys = [(row["variant"], row["role"], row["lr"], row["seed"]) for row in rows]
    seeds = [FRESH + i for i in range(3)]
    assert [key for key in keys if key[1] == "fresh"] == [
        (variant, "fresh", rates[variant], seed) for variant in rates for seed in seeds
    ]
    assert [key for key in keys if key[1] == "control"] == [
        ("adamw", "control", 2e-3, seed) for seed in seeds
    ]
    lines = capsys.readouterr().out.splitlines()
    assert len(first) == 5  # two references, one tuning run and two fresh runs
    assert {*first} <= {*lines}  # with the same seconds: these runs were not repeated
    (board,) = [line for line in lines if line.startswith("dopr-adamw ") and " × " in line]
    assert board.count("×") == 2  # at its own rate, and at equal rates
    protocol = json.loads((tmp_path / "protocol.json").read_text())
    assert protocol["variants"].keys() == {"adamw", "dopr-adamw"}
    assert protocol["fresh_seeds"] == seeds
    assert len(protocol["command"].splitlines()) == 2


def test_a_control_becomes_a_fresh_run_if_its_rate_becomes_the_best(tmp_path):
    control = study(tmp_path, "--steps", "5").trial(parse_variant("adamw"), "control", 1e-3, FRESH)
    run_trial(control)
    assert run_trial(replace(control, role="fresh"))["role"] == "fresh"
    assert read_record(control.folder)["role"] == "fresh"


def test_a_trial_trains_the_same_model_as_its_command(tmp_path):
    changes = ["n_embd=16", "n_head=1", "eval_batches=1"]
    small = study(tmp_path, "--steps", "3", "--tokens_per_step", "32", "--episodes", "4",
                  "--set", *changes, task=TINY)  # fmt: skip
    trial = small.trial(parse_variant("dopr-adamw"), "tuning", 1e-3, 0)
    record = run_trial(trial)
    words = [each for each in trial.command if not each.startswith("--out_dir")]
    command = [sys.executable, *words, f"--out_dir={tmp_path / 'by_hand'}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    name = "checkpoints/step-00000003/model.safetensors"
    assert (trial.folder / name).read_bytes() == (tmp_path / "by_hand" / name).read_bytes()
    assert record["role"] == "tuning"
    assert record["grade"]["metrics"]["accumulated_kl"]["n"] == 4


def test_an_error_of_a_run_is_reported_with_its_message(tmp_path):
    other = study(tmp_path, "--set", "init_from=nowhere", task=TINY)
    trial = other.trial(parse_variant("adamw"), "tuning", 1e-3, 0)
    with pytest.raises(TrialError, match="failed: init_from=nowhere"):
        run_trial(trial)
    assert "init_from=nowhere" in (trial.folder / "train.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "lsd", "--optimizers", "adamw"], "did you mean 'lds'"),
        (["--task", "pdfa,state=3", "--optimizers", "adamw"], "did you mean 'states'"),
        (["--task", "lds", "--optimizers", "adamm"], "NAME is one of"),
        (["--task", "lds", "--optimizers", "adamw", "--seeds", "0"], "--seeds=0"),
        (["--task", "lds", "--optimizers", "adamw", "--tuning_seeds", "201"], "at most 200"),
        (["--task", "pdfa", "--optimizers", "adamw", "--set", "x"], "form key=value"),
        (["--task", "pdfa", "--optimizers", "adamw", "--set", "n_hed=2"], "did you mean 'n_head'"),
        (["--task", "pdfa", "--optimizers", "adamw", "--set", "lr=2"], "lr is fixed here"),
        (["--task", "pdfa", "--optimizers", "adamw", "--set", "n_head=3"], "divisible by n_head=3"),
        (["--task", "pdfa", "--optimizers", "adamw", "--set", "block_size=8"], "is fixed here"),
        (["--task", "pdfa", "--optimizers", "dopr-sgd+gamma=-1"], "gamma=-1"),
        (["--task", "pdfa", "--optimizers", "adamw,sgd,adamw"], "adamw is given more than once"),
        (["--task", "lds", "--optimizers", "adamw", "--set", "gamma=1"], "optimizer+gamma"),
        (["--task", "lds", "--optimizers", "dopr-adamw+exponent=3"], "exponent=3"),
        (["--task", "lds", "--optimizers", "adamw+gamma=1"], "task lds has no setting gamma"),
    ],
)
def test_a_wrong_command_is_refused_before_any_work(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--out", str(tmp_path / "study")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("protocol.json", "{", "Invalid JSON"),
        ("protocol.json", "[]", "Input should be an object"),
        ("protocol.json", "{}", "command: Field required"),
        ("records.jsonl", '{"variant": "adamw"}', "task: Field required"),
    ],
)
def test_a_damaged_study_is_refused_before_any_run_and_kept(
    tmp_path, capsys, file, content, problem
):
    (tmp_path / file).write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main([*QUICK, "--optimizers", "adamw", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / file}")
    assert problem in error
    assert (tmp_path / file).read_text() == content
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("record.json", "{", "Invalid JSON"),
        ("record.json", "{}", "asked: Field required"),
        ("config.json", "[]", "Input should be an object"),
    ],
)
def test_the_damaged_file_of_a_run_is_named(tmp_path, file, content, problem):
    (tmp_path / file).write_text(content)
    with pytest.raises(TrialError, match=f"{file}: {problem}.*; delete the folder"):
        finished(tmp_path, {"lr": 0.1})


def test_a_folder_holds_one_study_with_one_meaning_of_each_variant(tmp_path):
    first = study(tmp_path)
    first.begin("first")
    with pytest.raises(ValueError, match="holds a study with another steps"):
        study(tmp_path, "--steps", "7").begin("second")
    (variant,) = first.variants
    other = replace(variant, settings=(*variant.settings, ("eps", 1.0)))
    with pytest.raises(ValueError, match="holds a study with another adamw"):
        replace(first, variants=(other,)).begin("second")


def test_the_record_of_a_run_with_other_settings_is_refused(tmp_path):
    trial = study(tmp_path, "--steps", "5").trial(parse_variant("adamw"), "tuning", 1e-3, 0)
    assert run_trial(trial) == run_trial(trial)
    other = replace(trial, settings=trial.settings | {"max_steps": 6})
    with pytest.raises(TrialError, match="max_steps was 5, is 6; delete the folder of the run"):
        run_trial(other)


def test_a_setting_that_a_record_lacks_had_its_default():
    now = {"lr": 0.1, "parallel": "ddp", "gamma": 0.1}
    assert not differences({"lr": 0.1}, now)
    assert differences({"lr": 0.1, "gamma": 1.0}, now) == {"gamma": "was 1.0, is 0.1"}
    assert differences({"lr": 0.1, "retired": 1}, now) == {"retired": "was 1, is None"}


def test_a_record_of_an_earlier_version_may_have_settings_that_do_not_change_the_model():
    assert not differences({"lr": 0.1, "save_every": 100_000}, {"lr": 0.1})


def test_fresh_runs_at_a_new_best_rate_replace_those_at_the_old_one(tmp_path):
    path = tmp_path / "records.jsonl"
    old = [record("adamw", seed, 1.0, lr=0.01) for seed in (200, 201)]
    others = [record("adamw", 0, 1.0, lr=0.01, role="tuning"), record("sgd", 200, 1.0, lr=0.01)]
    unite(path, [*old, *others])
    rows = unite(path, [record("adamw", 200, 2.0, lr=0.02)])
    found = [(row["variant"], row["lr"], row["seed"]) for row in rows]  # seed 201 is gone, too
    assert found == [("adamw", 0.01, 0), ("adamw", 0.02, 200), ("sgd", 0.01, 200)]
    assert read_lines(path) == rows
