"""Records are complete, continue without duplicates, and never stop a run."""

import json
import sys
from types import SimpleNamespace

import pytest

from trainer.metrics import MetricsLog, mfu

TRAIN = {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 10.0, "mfu": None}
TRAIN |= {"step_ms": 1.0, "skipped": 0}


def rows(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_row_has_a_kind_and_a_step(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0, 10)
    log.write("run", 0, event="start")
    log.train(1, **TRAIN)
    log.val(1, {"loss": 2.0, "bits_per_byte": 1.0, "n_tokens": 7})
    log.close()
    assert [(row["kind"], row["step"]) for row in rows(tmp_path)] == [
        ("run", 0),
        ("train", 1),
        ("val", 1),
    ]
    assert "step 1/10 (10%)" in capsys.readouterr().out


def test_a_resumed_run_removes_the_rows_that_it_will_write_again(tmp_path):
    log = MetricsLog(tmp_path, 0, 10)
    for step in range(1, 5):
        log.train(step, **TRAIN)
        log.val(step, {"loss": 2.0, "bits_per_byte": 1.0, "n_tokens": 7})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    MetricsLog(tmp_path, 2, 10).close()
    assert [(row["kind"], row["step"]) for row in rows(tmp_path)] == [
        ("train", 1),
        ("val", 1),
        ("train", 2),  # step 2 was trained, but its validation is repeated on resume
    ]


class BrokenRun:
    def log(self, *args, **kwargs):
        raise ConnectionError("no route")

    def finish(self):
        raise ConnectionError("no route")


def wandb_with(init):
    api = SimpleNamespace(api_key="key")
    return SimpleNamespace(init=init, api=api, Settings=lambda **kwargs: None)


def fail(**kwargs):
    raise RuntimeError("no API key configured")


@pytest.mark.parametrize("init", [fail, lambda **kwargs: BrokenRun()], ids=["init", "log"])
def test_a_failing_wandb_stops_nothing_and_loses_nothing(tmp_path, monkeypatch, capsys, init):
    monkeypatch.setitem(sys.modules, "wandb", wandb_with(init))
    log = MetricsLog(tmp_path, 0, 10)
    log.start_wandb(tmp_path, "online", "test", {})
    log.train(1, **TRAIN)
    log.train(2, **TRAIN)
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert capsys.readouterr().out.count("warning: wandb is off") == 1


def test_mfu_is_a_fraction_of_the_peak_and_none_if_the_peak_is_unknown():
    assert mfu(494.5e12, "NVIDIA H100 80GB HBM3", "bfloat16") == pytest.approx(0.5)
    assert mfu(1e12, "Some New GPU", "bfloat16") is None
    assert mfu(1e12, "NVIDIA H100 80GB HBM3", "float32") is None
