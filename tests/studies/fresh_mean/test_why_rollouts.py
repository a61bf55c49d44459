"""Test the experiment on `pdfa`: training with a rule, grading, and pairs by seed."""

from studies.fresh_mean import why_rollouts
from studies.fresh_mean.why_rollouts import measure, run, table_of


def test_a_run_trains_with_the_rule_and_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(why_rollouts, "RUNS", tmp_path)
    monkeypatch.setattr(why_rollouts, "TASK", "pdfa,horizon=8,n_documents=64")
    monkeypatch.setattr(why_rollouts, "STEPS", 20)
    monkeypatch.setattr(why_rollouts, "EPISODES", 8)
    found = {rule: run(rule, 4e-3, 300) for rule in ("base", "mean removed")}
    assert found["base"]["loss"] != found["mean removed"]["loss"]
    monkeypatch.setattr(why_rollouts, "Intervention", None)
    assert run("base", 4e-3, 300) == found["base"]


def test_a_rule_is_tuned_by_validation_and_compared_by_seed(monkeypatch):
    def fake(rule, lr, seed):
        factor = 1.0 if rule == "base" else 0.5
        loss = abs(lr - 8e-3) + seed / 1e6
        return {"loss": loss, "error": factor * seed, "log_error": 0.0 if rule == "base" else -1.0}

    monkeypatch.setattr(why_rollouts, "run", fake)
    rows = [measure(rule) for rule in ("base", "exact")]
    assert [row["lr"] for row in rows] == [8e-3, 8e-3]
    assert "0.37 [0.37, 0.37]" in table_of(rows)
