"""Test that each ablation changes the setting in its name, at the rate of the comparison."""

import pytest

from studies.fresh_mean import ablations
from studies.fresh_mean.ablations import CHANGES, measure, table_of
from trainer.config import load_config


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_a_valid_setting_and_changes_something(monkeypatch, change):
    found = {}

    def run(optimizer, lr, seed, **settings):
        words = [f"--{key}={value}" for key, value in settings.items()]
        config, _ = load_config([*words, f"--optimizer={optimizer}", f"--lr={lr}"])
        found[seed] = config
        return 4.0 + seed

    monkeypatch.setattr(ablations, "run", run)
    row = measure(("adamw", 0.016, change))
    assert row["mean"] == 34.5
    assert {config.lr for config in found.values()} == {0.016}
    config = found[30]
    for setting in change.split(", "):
        if "=" in setting:
            key, value = setting.split("=")
            assert f"{getattr(config, key)}".lower() in (value, f"{value}.0")
    assert config.fresh_mean == ("without" not in change)
    assert "34.500 ± 0.707" in table_of([row])
