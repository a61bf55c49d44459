"""The table of the study of `fresh_mean` pairs the losses by seed."""

import pytest

from studies import fresh_mean
from studies.fresh_mean import MODES, difference, main, measure, table_of


def test_a_difference_is_paired_and_has_a_t_interval():
    assert difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]) == "-1.000 ± 0.000"
    assert difference([1.0, 2.0], [0.0, 0.0]) == "+1.500 ± 6.353"  # 12.706 times 0.5


def test_every_mode_is_tuned_on_one_seed_and_measured_on_others(monkeypatch):
    calls = []

    def run(optimizer, lr, seed, **dopr):
        calls.append((lr, seed, dopr))
        return 4.0 + seed / 100 - ("fresh_mean" in dopr)

    monkeypatch.setattr(fresh_mean, "run", run)
    monkeypatch.setattr(fresh_mean, "sweep", lambda *_, seed: {1.0: 5.0, 2.0: 4.0, 4.0: seed})
    rows = [measure(("adamw", mode)) for mode in MODES]
    assert {lr for lr, *_ in calls} == {2.0}
    assert {seed for _, seed, _ in calls} == {11, 12, 13, 14, 15}
    table = table_of(rows)
    assert table.count("-1.000 ± 0.000") == 3  # fresh mean against both bases and fast mode


def test_an_unknown_optimizer_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        main_with(["--out", str(tmp_path / "x.json"), "--optimizers", "adam"])


def main_with(argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fresh_mean", *argv])
        main()
