"""Records are complete, continue without duplicates, and never stop a run."""

import errno
import json
import resource
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


def test_a_resumed_run_removes_later_rows_and_replaces_those_of_its_first_step(tmp_path):
    log = MetricsLog(tmp_path, 0, 10)
    for step in range(1, 5):
        log.train(step, **TRAIN)
        log.val(step, {"loss": 2.0, "bits_per_byte": 1.0, "n_tokens": 7})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    log = MetricsLog(tmp_path, 2, 10)
    kept = [("train", 1), ("val", 1), ("train", 2), ("val", 2)]
    assert [(row["kind"], row["step"]) for row in rows(tmp_path)] == kept
    log.val(2, {"loss": 1.5, "bits_per_byte": 1.0, "n_tokens": 7})
    assert [(row["kind"], row["step"]) for row in rows(tmp_path)] == kept
    assert [row["loss"] for row in rows(tmp_path) if row["kind"] == "val"] == [2.0, 1.5]
    log.close()
    MetricsLog(tmp_path, 0, 10).close()  # another run, which begins anew
    assert rows(tmp_path) == []


def test_old_rows_that_cannot_be_removed_do_not_stop_the_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 9}\n')
    (tmp_path / "metrics.tmp").mkdir()  # in the way of the rewritten file
    log = MetricsLog(tmp_path, 2, 10)
    log.train(3, **TRAIN)
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [9, 3]
    assert "keeps rows of later steps" in capsys.readouterr().out


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


def test_rows_that_cannot_be_written_are_written_later(tmp_path, capsys):
    """For example while the disk is full, or after the folder was removed."""
    folder = tmp_path / "run"
    folder.mkdir()
    log = MetricsLog(folder, 0, 10)
    folder.rename(tmp_path / "elsewhere")
    log.train(1, **TRAIN)
    log.train(2, **TRAIN)
    folder.mkdir()
    log.train(3, **TRAIN)
    log.close()
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]
    assert capsys.readouterr().out.count("cannot be written now") == 1


def test_a_full_disk_leaves_no_part_of_a_row(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0, 10)
    log.train(1, **TRAIN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    log.train(2, **TRAIN)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    log.close()
    assert "1 rows of" in capsys.readouterr().out


def test_a_terminal_that_is_closed_stops_nothing(tmp_path, monkeypatch):
    def gone(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    log = MetricsLog(tmp_path, 0, 10)
    monkeypatch.setattr("trainer.metrics.tqdm.write", gone)
    log.train(1, **TRAIN)
    log.train(2, **TRAIN)
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_damaged_lines_are_removed_and_counted(tmp_path, capsys):
    good = b'{"kind": "train", "step": 1}\n'
    damaged = [b"\xff\xfe\n", b"[1]\n", b'{"step": 1}\n', b"[" * 100_000 + b"\n"]
    (tmp_path / "metrics.jsonl").write_bytes(good + b"".join(damaged) + good + b'{"kind')
    MetricsLog(tmp_path, 5, 10).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == good * 2
    assert "4 damaged lines" in capsys.readouterr().out
