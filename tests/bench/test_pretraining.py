"""What is run next, and what a changed precision changes."""

import math

import pytest
import torch

import optim.apply
import train
from bench import precisions
from bench.pretraining import RATES, SWEPT, VARIANTS, Run, next_run, rows_of, table
from bench.timing import write_rows
from tests.tiny import argv, weights


def row(run, loss):
    figures = {"loss": loss, "survival": 0.5, "step_ms": 100.0, "has_diverged": loss is None}
    return run._asdict() | figures


def run_all(loss_of):
    """Every run in order, whose losses are as said."""
    rows = []
    while (run := next_run(rows)) and len(rows) < 100:
        rows.append(row(run, loss_of(run)))
    return rows


def runs(rows):
    return [Run(row["variant"], row["lr"], row["seed"]) for row in rows]


def test_both_are_swept_and_fresh_seeds_run_at_the_best_of_their_own():
    best = {"muon": 2e-3, "dopr-muon": 2e-3}
    done = runs(run_all(lambda run: abs(math.log(run.lr / best[run.variant.split(",")[0]]))))
    assert done[:6] == [Run(variant, lr, 0) for variant in SWEPT for lr in RATES]
    assert done[6:] == [Run(v, 2e-3, seed) for seed in (200, 201, 202) for v in VARIANTS]


def test_a_sweep_goes_on_beyond_the_edge_that_is_best():
    done = runs(run_all(lambda run: run.lr if run.variant == "muon" else -run.lr))
    muon = [run.lr for run in done if run.variant == "muon" and run.seed == 0]
    assert muon == [1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5, 3.125e-5]  # eight at most
    assert {run.lr for run in done if run.variant == "dopr-muon, bf16 gradients"} == {0.128}


def test_a_rate_that_diverged_is_not_the_best():
    done = runs(run_all(lambda run: None if run.lr > 1e-3 else abs(run.lr - 5e-4)))
    assert {run.lr for run in done if run.seed} == {5e-4}


def test_a_table_has_means_over_fresh_seeds_and_the_ratio_of_step_times():
    rows = run_all(lambda run: 3.0 + (run.seed - 201) / 10 + (run.lr != 2e-3))
    rows = [r | {"step_ms": 120.0} if "dopr" in r["variant"] else r for r in rows]
    muon, dopr, *_ = table(rows)
    assert muon.endswith(
        "val loss 3.0000 ± 0.1000  survival 0.5000 ± 0.0000  100.0 ms (1.000)  3 seeds"
    )
    assert "120.0 ms (1.200)" in dopr
    assert next(iter(table(rows[:6]))).endswith("not run yet")


def test_runs_on_another_device_or_with_other_settings_are_not_continued(tmp_path):
    path, here = tmp_path / "result.json", {"device": "H200", "settings": {"lr": 1}, "git": "b"}
    assert rows_of(path, here) == []
    write_rows(path, here | {"git": "a"}, [{"variant": "muon"}])
    assert rows_of(path, here) == [{"variant": "muon"}]
    for changed in ({"device": "H100"}, {"settings": {"lr": 2}}):
        with pytest.raises(ValueError, match=r"has runs with .*; use another"):
            rows_of(path, here | changed)


def trained(dataset, out, change, **settings):
    arguments = argv(dataset, out, dopr="true", max_steps=4, save_every=4, eval_every=4, **settings)
    code = train.main(arguments) if change is None else precisions.main([change, *arguments])
    assert code == 0
    return weights(out, 4)


@pytest.mark.parametrize(("dtype", "is_changed"), [("bfloat16", True), ("float32", False)])
def test_bf16_gradients_are_those_of_a_bf16_product(dataset, tmp_path, dtype, is_changed):
    plain = trained(dataset, tmp_path / "plain", None, dtype=dtype)
    assert trained(dataset, tmp_path / "shipped", "shipped", dtype=dtype) == plain
    changed = trained(dataset, tmp_path / "changed", "bf16_gradients", dtype=dtype)
    assert (changed != plain) == is_changed


@pytest.mark.parametrize("precision", ["bf16x3", "ieee"])
def test_a_product_is_made_in_the_precision_that_is_wanted(precision, monkeypatch):
    triton_apply = pytest.importorskip("kernels._triton_apply", exc_type=ImportError)
    asked = []

    def product(G, P, precision="tf32x3"):
        asked.append(precision)
        return G

    monkeypatch.setattr(triton_apply, "apply", product)
    monkeypatch.setattr(optim.apply, "choose", lambda *args, **kwargs: "triton")
    layer = [torch.ones(2, 4)], [torch.ones(1, 4, 4)]
    with precisions.CHANGES[f"{precision}_apply"]():
        optim.apply.products(*layer, "auto")
    optim.apply.products(*layer, "auto")
    assert asked == [precision, "tf32x3"]


def test_an_unknown_change_is_refused(capsys):
    assert precisions.main(["bf8"]) == 2
    assert "wants one of shipped, bf16_gradients" in capsys.readouterr().out
