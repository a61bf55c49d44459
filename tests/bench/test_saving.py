"""The costs of saves are those that were put into the times of steps."""

import json

import pytest

from bench import saving


def test_costs_are_multiples_of_a_step_without_a_save():
    in_place, in_background = [
        saving.RunTimes([0.5] * saving.STEPS, [0.0] * (saving.STEPS + 1)) for _ in range(2)
    ]
    for step in saving.SAVES:
        for times, pause in ((in_place, 1.0), (in_background, 0.25)):
            times.pauses[step] = pause
            times.steps[step] += pause
        in_background.steps[step + 1] += 0.125  # slowed down by the write
    n = len(saving.SAVES)
    assert saving.costs(in_place, in_background) == {
        "step_s": 0.5,
        "pause in place": [2.0] * n,
        "total in place": [2.0] * n,
        "pause in background": [0.5] * n,
        "total in background": [0.75] * n,
    }


@pytest.mark.slow
def test_the_command_measures_every_counted_save(tmp_path):
    saving.main(["--sizes", "tiny", "--rounds", "1", "--out", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    (costs,) = row["rounds"]
    for key in costs.keys() - {"step_s"}:
        assert len(costs[key]) == len(saving.SAVES)
    assert costs["step_s"] == row["step_s"] > 0


def test_an_unknown_size_is_refused(capsys):
    with pytest.raises(SystemExit):
        saving.main(["--sizes", "huge"])
    assert "unknown huge; choose from tiny" in capsys.readouterr().err
