"""`python -m bench.gpu first`: limits, outcomes and continuation, with steps that were made up."""

import json
import os
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from bench.first import run as first
from bench.first.plan import STEPS, FirstStep
from bench.first.run import FirstRun, perform, perform_all
from bench.process import ROOT
from bench.results import ORIGIN
from tests.bench.test_train_throughput import STAND_IN
from tests.kernels.interpreter import needs_interpreter

FACTS = dict.fromkeys(ORIGIN, "here")
# Writes one row more than an earlier call, then ends as its first argument says.
FAKE = f"""
import sys, time
from pathlib import Path
from bench.results import earlier_rows, write_rows
from filelock import FileLock
facts, how, out = {FACTS}, sys.argv[1], Path(sys.argv[-1].removeprefix("--out="))
if how == "locks":
    lock = FileLock("{{lock}}")
    lock.acquire()
    Path("{{lock}}.held").touch()
else:
    rows = earlier_rows(out, facts)
    row = dict(arguments=sys.argv[1:-1]) | (dict(exception="") if how == "raises" else dict())
    write_rows(out, facts, [*rows, row])
if how not in ("ends", "raises"):
    print("some output\\nthe reason", flush=True)
    sys.exit(3) if how == "fails" else time.sleep(600)
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Return a function that makes a FirstRun, whose steps may use the module `fake`."""
    (tmp_path / "fake.py").write_text(FAKE.replace("{lock}", str(tmp_path / "lock")))
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    monkeypatch.setattr(first, "COMPILE", [])

    def make(*, left_s=600.0, facts=FACTS, nanogpt=None):
        ends = time.perf_counter() + left_s + first.GRACE_S + first.REPORT_S
        return FirstRun(tmp_path, False, nanogpt, facts, variables, ends)

    return make


def fake(how, limit_s=60.0, **options):
    return FirstStep("fake", limit_s, (how,), **options)


@pytest.fixture
def plan(monkeypatch):
    """Return a function that replaces the steps."""

    def replace(**steps):
        monkeypatch.setattr(first, "STEPS", steps)
        return list(steps)

    return replace


def result(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_step_that_fails_or_hangs_keeps_its_rows_and_does_not_stop_the_next(call, plan, tmp_path):
    names = plan(bad=fake("fails"), slow=fake("hangs", 4.0), good=fake("ends"))
    perform_all(names, call())
    assert result(tmp_path, "bad")["outcome"] == "failed with exit code 3: the reason"
    assert result(tmp_path, "slow")["outcome"] == "stopped after 4 s"
    assert result(tmp_path, "good")["outcome"] == "complete"
    assert [len(result(tmp_path, name)["rows"]) for name in names] == [1, 1, 1]
    assert (tmp_path / "bad.log").read_text() == "some output\nthe reason\n"


def test_a_second_call_skips_complete_steps_and_continues_the_others(call, plan, tmp_path):
    names = plan(good=fake("ends"), bad=fake("fails"))
    perform_all(names, call())
    perform_all(names, call())
    assert [len(result(tmp_path, name)["rows"]) for name in names] == [1, 2]


def test_measurements_that_raised_are_no_complete_step_and_are_repeated(call, plan, tmp_path):
    names = plan(bad=fake("raises"))
    perform_all(names, call())
    found = result(tmp_path, "bad")
    assert found["outcome"] == "failed: 1 of 1 measurements raised; see bad.log"
    plan(bad=fake("ends"))
    perform_all(names, call())
    found = result(tmp_path, "bad")
    assert found["outcome"] == "complete"
    assert found["rows"] == [{"arguments": ["ends"]}]


@pytest.mark.parametrize("key", ORIGIN)
def test_a_result_from_elsewhere_is_replaced(call, plan, tmp_path, key):
    (tmp_path / "good.json").write_text(
        json.dumps({"environment": FACTS | {key: "there"}, "rows": [1, 2], "outcome": "complete"})
    )
    plan(good=fake("ends"))
    assert perform("good", call())
    assert len(result(tmp_path, "good")["rows"]) == 1


def test_an_endless_step_keeps_its_rows_whatever_the_sources(call, plan, tmp_path):
    plan(real=fake("ends", is_endless=True))
    assert perform("real", call())
    assert result(tmp_path, "real")["outcome"] == "continued"
    assert perform("real", call(facts=FACTS | {"source": "there"}))
    assert len(result(tmp_path, "real")["rows"]) == 2


def test_no_step_starts_that_has_too_little_time(call, plan, tmp_path, capsys):
    names = plan(long=fake("ends", 100.0), short=fake("ends", 1.0))
    perform_all(names, call(left_s=30))
    assert not list(tmp_path.glob("*.json"))
    assert "repeat the command to continue" in capsys.readouterr().out


def test_a_step_ends_before_its_call(call, plan, tmp_path):
    plan(slow=fake("hangs", 7.0))
    assert perform("slow", call(left_s=4))
    assert result(tmp_path, "slow")["outcome"] == "stopped after 4 s"


def test_a_step_that_lacks_something_is_skipped_with_a_reason_and_tried_again(call, plan, tmp_path):
    names = plan(
        package=fake("ends", needs=("json", "no_such_package")),
        loop=fake("ends", uses_nanogpt=True),
    )
    perform_all(names, call())
    reasons = [result(tmp_path, name)["outcome"] for name in names]
    assert reasons[0] == "skipped: needs no_such_package; see requirements-gpu.txt"
    assert reasons[1] == "skipped: needs --nanogpt CHECKOUT"
    perform("loop", call(nanogpt=tmp_path))
    assert result(tmp_path, "loop")["outcome"] == "complete"
    assert result(tmp_path, "loop")["rows"] == [{"arguments": ["ends", f"--nanogpt={tmp_path}"]}]


def test_a_step_learns_its_time_limit(call, plan, tmp_path):
    plan(timed=fake("ends", 100.0, has_seconds=True))
    perform("timed", call())
    assert result(tmp_path, "timed")["rows"] == [{"arguments": ["ends", "--seconds=85"]}]


def test_compiling_meanwhile_is_stopped_in_time(call, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(first, "COMPILE", [fake("locks")])
    monkeypatch.setattr(first, "COMPILE_S", 4.0)
    perform_all(plan(correctness=fake("ends")), call())
    assert (tmp_path / "lock.held").exists()
    FileLock(tmp_path / "lock").acquire(timeout=10)  # or raises
    assert result(tmp_path, "correctness")["outcome"] == "complete"


def test_two_calls_are_enough_and_the_second_has_time_for_the_real_run():
    limits = [step.limit_s for step in STEPS.values() if not step.is_endless]
    assert sum(limits) <= 11 * 60 - 30  # the two calls take half a minute to start


def test_pins_are_those_of_requirements_txt():
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    lines = (ROOT / "requirements-gpu.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} <= set(pins)


@needs_interpreter
@pytest.mark.slow
def test_every_step_runs_in_tiny_form_and_is_complete(tmp_path):
    nanogpt = tmp_path / "nanoGPT"
    nanogpt.mkdir()
    for name, text in {"train.py": STAND_IN, "model.py": "", "configurator.py": ""}.items():
        (nanogpt / name).write_text(text)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench.gpu", "first", "--tiny"]
    command += [f"--out={out}", f"--nanogpt={nanogpt}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    outcomes = {name: result(out, name)["outcome"] for name in STEPS}
    assert outcomes.pop("pretraining") == "continued"
    assert set(outcomes.values()) == {"complete"}
    assert all(row["is_right"] for row in result(out, "correctness")["rows"])
    assert not (out / "compile.log").read_text()
    again = subprocess.run([*command, "loop"], cwd=ROOT, capture_output=True, text=True)
    assert "== loop: complete in an earlier call" in again.stdout
    decided = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "decide", str(out)],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": True},
    )
    assert decided.stdout.strip() in again.stdout
