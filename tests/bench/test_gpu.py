"""Tests of `make bench-gpu` in tiny versions, without a GPU."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

pytest.importorskip("triton", reason="triton is not installed: it is for Linux only")

from bench import gpu, kernel_rules
from bench.gpu import STAGES, GpuStage
from bench.process import exit_code
from bench.timing import compared, interleaved
from tests.kernels.interpreter import needs_interpreter

# Relative to float64, for fp32 inputs. The interpreter truncates to bf16, as in orthogonalize.
TOLERANCE = {"gram": 1e-5, "inverse": 2e-3, "apply": 1e-4, "orthogonalize": 0.1}


HOLDS_LOCK = """
import pathlib, time, filelock
lock = filelock.FileLock(r"{0}/lock")
lock.acquire()
pathlib.Path(r"{0}/ready").touch()
time.sleep(600)"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run every stage with --tiny, and return the results of those that write one."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "bench.gpu", "--tiny", f"--out={out}"]
    process = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-5000:]
    names = [name for name, stage in STAGES.items() if stage.has_result]
    return {name: json.loads((out / f"gpu_{name}.json").read_text()) for name in names}


@needs_interpreter
@pytest.mark.slow
def test_a_result_records_its_environment(results):
    for result in results.values():
        assert {"device", "torch", "triton", "git"} <= result["environment"].keys()
        assert result["rows"]


@needs_interpreter
@pytest.mark.slow
def test_all_contenders_compute_the_same_result(results):
    rows = results["kernels"]["rows"]
    assert len(rows) == 7
    for row in rows:
        tolerance = TOLERANCE[row["case"].split()[0]]
        assert any(name.startswith("triton") for name in row["error"])
        assert all(error < tolerance for error in row["error"].values()), row
        assert row["error"].keys() == row["ms"].keys() == row["ratio"].keys()


@needs_interpreter
@pytest.mark.slow
def test_tile_configurations_agree_with_the_default(results):
    rows = results["tiles"]["rows"]
    assert [row["case"].split()[0] for row in rows] == ["gram", "apply", "symmetric"]
    for row in rows:
        assert len(row["difference"]) >= 2
        assert max(row["difference"].values()) < 1e-5  # fp32 sums in a different order
        assert (row["ratio"][row["shipped"]], row["does_not_fit"]) == (1, [])
        assert row["best"] == min(row["ms"], key=row["ratio"].get)


@needs_interpreter
@pytest.mark.slow
def test_a_padded_head_has_the_gradient_of_the_plain_head(results):
    (row,) = results["head"]["rows"]
    assert list(row["ratio"]) == ["as it is", "whole tiles", "128 ids"]
    assert row["error"]["whole tiles"] == pytest.approx(row["error"]["as it is"], rel=0.1)
    assert row["error"]["as it is"] < 0.02  # bf16


@needs_interpreter
@pytest.mark.slow
def test_steps_are_timed_in_every_mode(results):
    rows = [row for name, result in results.items() if "step" in name for row in result["rows"]]
    settings = [tuple(row[key] for key in ("optimizer", "backend", "inverse")) for row in rows]
    assert settings == [
        ("adamw", "auto", "newton_schulz"),
        ("muon", "auto", "newton_schulz"),
        ("muon", "torch", "cholesky"),
    ]
    modes = {"base", "exact", "exact, blocks", "fast", "sampled"}
    modes |= {"fast, fresh mean", "sampled, fresh mean"}
    assert all(row["step_ms"].keys() == modes for row in rows)
    assert all(row["ratio"]["base"] == 1 for row in rows)


def test_a_stage_that_fails_is_reported(monkeypatch, capfd):
    stages = {
        "good": GpuStage("this", [], [], has_result=False),
        "bad": GpuStage("no_such_module", [], [], has_result=False),
    }
    monkeypatch.setattr(gpu, "STAGES", stages)
    assert gpu.run("good", Path(), tiny=False)
    assert not gpu.run("bad", Path(), tiny=False)
    assert "== bad: FAILED with exit code 1" in capfd.readouterr().out


def test_a_stage_that_fails_leaves_no_result_of_an_earlier_run(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "STAGES", {"bad": GpuStage("no_such_module", [], [])})
    (tmp_path / "gpu_bad.json").write_text("{}")
    assert not gpu.run("bad", tmp_path, tiny=False)
    assert not list(tmp_path.iterdir())


def test_a_result_that_a_stage_continues_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "STAGES", {"bad": GpuStage("no_such_module", [], [], continues=True)})
    (tmp_path / "gpu_bad.json").write_text("{}")
    assert not gpu.run("bad", tmp_path, tiny=False)
    assert (tmp_path / "gpu_bad.json").read_text() == "{}"


def test_a_stage_gets_its_own_arguments_and_tiny_stages_start_anew(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(gpu, "STAGES", {"a": GpuStage("this", ["full"], ["tiny"], continues=True)})
    monkeypatch.setattr(
        gpu, "exit_code", lambda command, environment, limit_s: commands.append(command) or 0
    )
    (tmp_path / "gpu_a.json").write_text("{}")
    assert gpu.run("a", tmp_path, tiny=True, extra=["--nanogpt", "there"])
    out = ["--out", str(tmp_path / "gpu_a.json")]
    assert commands == [[sys.executable, "-m", "this", "tiny", "--nanogpt", "there", *out]]
    assert not list(tmp_path.iterdir())


def test_a_signal_ends_the_stage_that_runs(tmp_path):
    driver = f"""
import sys
from bench.process import exit_code
from eval.command import leave_on_signals
leave_on_signals()
exit_code([sys.executable, "-c", {HOLDS_LOCK!r}.format({str(tmp_path)!r})], {{}}, 60)"""
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=gpu.ROOT)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    FileLock(tmp_path / "lock").acquire(timeout=60)


def test_a_command_that_takes_too_long_is_stopped():
    assert exit_code([sys.executable, "-c", "import time; time.sleep(600)"], {}, 0.5) is None


def test_a_command_leaves_no_process_behind(tmp_path):
    grandchild = HOLDS_LOCK.format(str(tmp_path))
    child = f"""
import pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {grandchild!r}])
while not pathlib.Path({str(tmp_path / "ready")!r}).exists():
    time.sleep(0.01)
sys.exit(3)"""
    assert exit_code([sys.executable, "-c", child], {}, 60) == 3
    FileLock(tmp_path / "lock").acquire(timeout=60)  # or raises


@pytest.mark.parametrize(("error", "is_accurate"), [(1e-6, True), (1e-2, False), (math.nan, False)])
def test_an_error_above_the_tolerance_is_found(error, is_accurate):
    for operation in ("gram", "inverse", "apply"):
        others = {"triton ieee": 1.0, "torch": 1.0}  # not the default implementation
        errors = others | {kernel_rules.SHIPPED[operation][0]: error}
        assert (
            kernel_rules.is_accurate({"case": f"{operation} d=8", "error": errors}) == is_accurate
        )


def test_contenders_take_turns():
    calls = []
    work = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleaved(work, torch.device("cpu"), rounds=3, seconds=60)
    assert calls == list("ababab")
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_ratios_are_medians_over_rounds():
    result = compared({"a": [1.0, 2.0, 4.0], "b": [3.0, 2.0, 2.0]})
    assert result["ms"] == {"a": 2.0, "b": 2.0}
    assert result["ratio"] == {"a": 1.0, "b": 1.0}
    assert result["rounds"] == 3
