"""Tests of the step times of `python -m bench.gpu first`."""

import runpy

import pytest

from bench.first import steps
from bench.first.steps import CONTENDERS, OPTIMIZERS, StepTimer, Turn, describe, missing
from bench.process import ROOT
from bench.step_overhead import PRESETS, modes
from trainer.presets import DOPR_KEYS

ALL = [(optimizer, name) for optimizer in OPTIMIZERS for name in CONTENDERS]


@pytest.fixture
def timer():
    return StepTimer("tiny")


def row(optimizer, contender, call=1):
    return {"optimizer": optimizer, "contender": contender, "call": call}


@pytest.mark.parametrize("config", ["gpt2_dopr.py", "gpt2_dopr_muon.py"])
def test_the_recommended_mode_is_that_of_the_presets(config):
    preset = runpy.run_path(str(ROOT / "config" / config))
    recommended = modes(PRESETS["gpt2"], 768, "cholesky")[CONTENDERS["recommended"]]
    assert recommended == {key: preset[key] for key in DOPR_KEYS if key in preset} | {
        "inverse": "cholesky"
    }


def test_contenders_without_a_row_are_measured_beside_their_base():
    assert missing(set()) == ALL
    assert missing(set(ALL)) == []
    assert missing(set(ALL) - {("adamw", "exact")}) == [("adamw", "base"), ("adamw", "exact")]


class Clock:
    """A clock in the place of the module `time`."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize(
    ("seconds", "n_rounds"), [(0, 1), (50 + 2 * 8 - 1, 1), (50 + 2 * 8, 2), (1000, 3)]
)
def test_rounds_follow_while_there_is_time_for_one_without_building(
    timer, monkeypatch, seconds, n_rounds
):
    monkeypatch.setattr(steps, "time", clock := Clock())
    made = []
    for turn in timer.turns([], rounds=3, seconds=seconds):
        made.append(turn)
        clock.now += 1.0
        if len(made) == 1:
            clock.now += 50.0
            timer.built_s += 50.0
    assert made == [Turn(1, number, *name) for number in range(n_rounds) for name in ALL]


def test_a_second_call_is_told_apart_and_ends_when_nothing_is_missing(timer):
    rows = [row(*name) for name in ALL[:-1]]
    assert list(timer.turns(rows, rounds=1, seconds=60)) == [
        Turn(2, 0, "adamw", "base"),
        Turn(2, 0, "adamw", "exact"),
    ]
    assert not list(timer.turns([row(*name) for name in ALL], rounds=1, seconds=60))


def test_a_contender_is_built_once_and_takes_steps_of_the_whole_batch(timer, monkeypatch):
    preset, turn, build, built = (
        PRESETS["tiny"],
        Turn(1, 0, "adamw", "recommended"),
        timer.build,
        [],
    )
    monkeypatch.setattr(timer, "build", lambda *name: built.append(name) or build(*name))
    rows = [timer.measure(turn), timer.measure(turn)]
    assert built == [("adamw", "recommended")]
    n_sequences = preset.accumulation * preset.micro_batch_size
    assert [row["tokens"] for row in rows] == [n_sequences * preset.block_size] * 2
    assert all(row["step_ms"] > 0 for row in rows)


def test_a_contender_that_raises_does_not_stop_the_others(timer, monkeypatch):
    def build(optimizer, contender):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(timer, "build", build)
    row = timer.measure(Turn(1, 0, "muon", "exact"))
    assert row.pop("exception") == "RuntimeError: out of memory"
    assert describe(row | {"exception": "why"}).endswith("FAILED  why")
    assert Turn(**row) == Turn(1, 0, "muon", "exact")
