"""Tests of the order of the runs of bench.pretraining, and of the changes of bench.precisions."""

import math

import pytest
import torch

import optim.dopr.refresh
import train
from bench import precisions
from bench.pretraining import (
    RATES,
    SWEPT,
    TINY,
    VARIANTS,
    PretrainingRun,
    curves,
    next_run,
    read_rows,
    run_missing,
    table,
)
from bench.pretraining import train as train_run
from bench.results import write_rows
from tests.tiny import argv, weights
from train import EXIT_DIVERGED


def row(run, loss):
    figures = {"loss": loss, "survival": 0.5, "step_ms": 100.0, "has_diverged": loss is None}
    return run._asdict() | figures


def run_all(loss_of):
    """Make every run in order, with the loss `loss_of(run)`."""
    rows = []
    while (run := next_run(rows)) and len(rows) < 100:
        rows.append(row(run, loss_of(run)))
    return rows


def runs(rows):
    return [PretrainingRun(row["variant"], row["lr"], row["seed"]) for row in rows]


def test_both_optimizers_are_swept_and_fresh_seeds_run_at_their_best_rates():
    best = {"muon": 2e-3, "dopr-muon": 2e-3}
    done = runs(run_all(lambda run: abs(math.log(run.lr / best[run.variant.split(",")[0]]))))
    assert done[:6] == [PretrainingRun(variant, lr, 0) for lr in RATES for variant in SWEPT]
    assert done[6:] == [PretrainingRun(v, 2e-3, seed) for seed in (200, 201, 202) for v in VARIANTS]


def test_a_sweep_is_extended_while_its_best_is_at_an_edge():
    done = runs(run_all(lambda run: run.lr if run.variant == "muon" else -run.lr))
    muon = [run.lr for run in done if run.variant == "muon" and run.seed == 0]
    assert muon == [1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5, 3.125e-5]  # eight at most
    assert {run.lr for run in done if run.variant == "dopr-muon, bf16 gradients"} == {0.128}


def test_a_rate_that_diverged_is_not_the_best():
    done = runs(run_all(lambda run: None if run.lr > 1e-3 else abs(run.lr - 5e-4)))
    assert {run.lr for run in done if run.seed} == {5e-4}


def test_a_sweep_that_diverges_at_every_rate_is_an_error():
    with pytest.raises(RuntimeError, match=r"every learning rate diverged: 0\.001, 0\.002, 0\.004"):
        run_all(lambda run: None)


def test_the_table_compares_variants_with_their_bases_by_seed():
    rows = run_all(lambda run: 3.0 + (run.seed - 201) / 10 + (run.lr != 2e-3))
    rows = [
        r | {"step_ms": 120.0, "loss": r["loss"] - 0.01} if r["variant"] == "dopr-muon" else r
        for r in rows
    ]
    swept, _, muon, dopr, changed, *_ = table(rows)
    assert (
        swept
        == "muon, val loss by learning rate: 0.001: -16.1000, 0.002: -17.1000, 0.004: -16.1000"
    )
    assert muon.endswith("loss 3.0000  survival 0.5000  step_ms 100.0000  3 seeds  ")
    assert dopr.endswith("-0.0100 [-0.0100, -0.0100] nats, x 1.200 ms of muon")
    assert changed.endswith("+0.0100 [+0.0100, +0.0100] nats, x 0.833 ms of dopr-muon")
    assert [*table(rows[:6])][2].endswith("not run yet")


def test_the_table_marks_divergence_and_compares_the_other_runs():
    rows = run_all(lambda run: abs(math.log(run.lr / 2e-3)))
    is_lost = {("muon", 201), ("dopr-muon, fp32 G P", 200)}
    rows = [
        r | {"loss": None, "step_ms": None, "has_diverged": True}
        if (r["variant"], r["seed"]) in is_lost
        else r
        for r in rows
    ]
    _, _, muon, dopr, *_, last = table(rows)
    assert muon.endswith("diverged")
    assert last.endswith("diverged")
    assert dopr.endswith("nats, x 1.000 ms of muon")


CURVES = """
{"kind": "run", "step": 0}
{"kind": "val", "step": 0, "loss": 7.0}
{"kind": "ttf", "step": 0, "survival": 0.1}
{"kind": "train", "step": 1, "step_ms": 900.0, "mfu": 0.1}
{"kind": "train", "step": 2, "step_ms": 800.0, "mfu": 0.1}
{"kind": "train", "step": 3, "step_ms": 10.0, "mfu": 0.4}
{"kind": "train", "step": 4, "step_ms": 12.0, "mfu": 0.4}
{"kind": "train", "step": 5, "step_ms": 11.0, "mfu": 0.5}
{"kind": "val", "step": 5, "loss": 3.0}
{"kind": "ttf", "step": 5, "survival": 0.6}
"""


def test_the_curves_and_the_median_step_time_of_a_run_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(CURVES.strip())
    assert curves(tmp_path, has_diverged=False) == {
        **{"has_diverged": False, "val": [[0, 7.0], [5, 3.0]], "ttf": [[0, 0.1], [5, 0.6]]},
        **{"loss": 3.0, "survival": 0.6, "step_ms": 11.0, "mfu": 0.5},
    }
    lost = curves(tmp_path, has_diverged=True)
    assert (lost["loss"], lost["survival"]) == (None, None)


class FinishedProcess:
    def __init__(self, returncode, stderr=""):
        self.returncode, self.stdout, self.stderr = returncode, "", stderr


def commanded(monkeypatch, tmp_path, run, done):
    """Return the row and the command line of a run whose subprocess is replaced by `done`."""
    commands = []

    def start(command, **_):
        commands.append(command)
        return done

    (tmp_path / "metrics.jsonl").write_text(CURVES.strip())
    monkeypatch.setattr("bench.pretraining.subprocess.run", start)
    return train_run(run, tmp_path, TINY), commands[0]


def test_a_variant_is_trained_by_its_config_and_change(monkeypatch, tmp_path):
    for variant, (change, base) in VARIANTS.items():
        row, command = commanded(
            monkeypatch, tmp_path, PretrainingRun(variant, 0.5, 7), FinishedProcess(0)
        )
        config = "config/gpt2_muon.py" if base == "muon" else "config/gpt2_dopr_muon.py"
        assert command[2:5] == ["bench.precisions", change, config]
        assert {"--lr=0.5", "--seed=7", f"--out_dir={tmp_path}"} <= {*command}
        assert ("--refresh_every=2" in command) == (base == "dopr-muon")
        assert (row["variant"], row["lr"], row["seed"], row["loss"]) == (variant, 0.5, 7, 3.0)


def test_a_run_that_diverged_has_a_row_and_one_that_failed_an_error(monkeypatch, tmp_path):
    run = PretrainingRun("muon", 0.5, 7)
    row, _ = commanded(monkeypatch, tmp_path, run, FinishedProcess(EXIT_DIVERGED, "error"))
    assert row["has_diverged"]
    with pytest.raises(RuntimeError, match="out of memory"):
        commanded(monkeypatch, tmp_path, run, FinishedProcess(1, "out of memory"))


def test_the_first_run_of_a_call_ignores_the_time_limit(monkeypatch, tmp_path, capsys):
    made = []

    def train(run, out, settings):
        made.append(run)
        return row(run, 3.0) | {"seconds": 100.0}

    monkeypatch.setattr("bench.pretraining.train", train)
    rows = [row(PretrainingRun("muon", 1e-3, 0), 3.0) | {"seconds": 100.0}]
    run_missing(rows, {"settings": {}, "git": "a", "torch": "b"}, tmp_path / "result.json", 1.0)
    assert made == [PretrainingRun("dopr-muon", 1e-3, 0)]
    assert (rows[-1]["git"], rows[-1]["torch"]) == ("a", "b")
    assert "2 runs are done, more are left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Invalid JSON"),
        ('{"rows": []}', "environment: Field required"),
        ('{"rows": [], "environment": {"device": 1}}', "environment.device: .*string"),
        (
            '{"rows": [{"variant": "muon"}], "environment": {"device": "H200", "settings": {}}}',
            "rows.0.lr: Field required",
        ),
    ],
)
def test_a_damaged_result_is_named(tmp_path, text, problem):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=rf"result\.json: .*{problem}"):
        read_rows(tmp_path / "result.json", {"device": "H200", "settings": {}})


def test_runs_on_another_device_or_with_other_settings_are_not_continued(tmp_path):
    path, current = tmp_path / "result.json", {"device": "H200", "settings": {"lr": 1}, "git": "b"}
    assert read_rows(path, current) == []
    rows = [row(PretrainingRun("muon", 1e-3, 0), 3.0) | {"seconds": 1.0, "mfu": None}]
    write_rows(path, current | {"git": "a"}, rows)
    assert read_rows(path, current) == rows
    for changed in ({"device": "H100"}, {"settings": {"lr": 2}}):
        with pytest.raises(ValueError, match=r"has runs with .*; give another --out"):
            read_rows(path, current | changed)


def trained(dataset, out, change, **settings):
    arguments = argv(dataset, out, dopr="true", max_steps=4, save_every=4, eval_every=4, **settings)
    code = train.main(arguments) if change is None else precisions.main([change, *arguments])
    assert code == 0
    return weights(out, 4)


@pytest.mark.parametrize(("dtype", "is_changed"), [("bfloat16", True), ("float32", False)])
def test_bf16_gradients_change_bf16_training_only(dataset, tmp_path, dtype, is_changed):
    plain = trained(dataset, tmp_path / "plain", None, dtype=dtype)
    assert trained(dataset, tmp_path / "shipped", "shipped", dtype=dtype) == plain
    changed = trained(dataset, tmp_path / "changed", "bf16_gradients", dtype=dtype)
    assert (changed != plain) == is_changed


@pytest.mark.parametrize("precision", ["bf16x3", "ieee"])
def test_a_change_sets_the_precision_of_the_product(precision, monkeypatch):
    triton_apply = pytest.importorskip("optim.kernels._triton_apply", exc_type=ImportError)
    asked = []

    def product(G, P, precision="tf32x3"):
        asked.append(precision)
        return G

    monkeypatch.setattr(triton_apply, "apply", product)
    monkeypatch.setattr(optim.dopr.refresh, "choose_backend", lambda *args, **kwargs: "triton")
    layer = [torch.ones(2, 4)], [torch.ones(1, 4, 4)]
    with precisions.CHANGES[f"{precision}_apply"]():
        optim.dopr.refresh.products(*layer, "auto")
    optim.dopr.refresh.products(*layer, "auto")
    assert asked == [precision, "tf32x3"]


def test_an_unknown_change_is_refused(capsys):
    with pytest.raises(SystemExit):
        precisions.main(["bf8"])
    assert "invalid choice: 'bf8'" in capsys.readouterr().err
