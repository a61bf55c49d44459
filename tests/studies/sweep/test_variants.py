"""Tests of the names of optimizers in comparisons."""

import pytest

from studies.sweep.variants import EXACT, FAST, parse_variant


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adamw", {"optimizer": "adamw", "dopr": False}),
        ("dopr-muon", {"optimizer": "muon"} | EXACT),
        ("fast-dopr-sgd", {"optimizer": "sgd"} | FAST),
        ("dopr-adamw+gamma=1e-2", {"optimizer": "adamw", "gamma": 0.01} | EXACT),
        ("muon+nesterov=false", {"optimizer": "muon", "dopr": False, "nesterov": False}),
        ("sgd+momentum=0.9", {"optimizer": "sgd", "dopr": False, "momentum": 0.9}),
    ],
)
def test_a_name_stands_for_settings_of_train(name, settings):
    variant = parse_variant(name)
    assert dict(variant.settings) == settings
    assert variant.base == settings["optimizer"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *(
            (name, "NAME is one of adamw, sgd")
            for name in ("adamm", "dopr-", "slow-dopr-adamw", "")
        ),
        ("dopr-adamw+gamma", "'gamma' is not of the form key=value"),
        ("dopr-adamw+gama=1", "unknown setting 'gama'; did you mean 'gamma'"),
        ("dopr-adamw+gamma=x", "gamma='x': must be a number"),
    ],
)
def test_a_malformed_name_is_refused(name, problem):
    with pytest.raises(ValueError, match=problem):
        parse_variant(name)


@pytest.mark.parametrize(
    "change",
    [
        *("lr=1", "seed=1", "max_steps=9", "batch_size=9", "dataset=x", "out_dir=x"),
        *("dopr=true", "optimizer=sgd", "n_layer=3", "block_size=9"),
    ],
)
def test_a_name_cannot_change_settings_that_all_optimizers_share(change):
    with pytest.raises(ValueError, match=f"{change.split('=')[0]} is fixed here"):
        parse_variant(f"adamw+{change}")
