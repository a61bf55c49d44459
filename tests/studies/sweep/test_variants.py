"""Names of optimizers in comparisons."""

import pytest

from studies.sweep.variants import EXACT, parse_variant


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adamw", {"optimizer": "adamw", "dopr": False}),
        ("dopr-muon", {"optimizer": "muon", "dopr": True, "refresh_every": 1}),
        (
            "fast-dopr-sgd",
            {"optimizer": "sgd", "dopr": True, "refresh_every": 10, "sigma_beta": 0.95},
        ),
        ("dopr-adamw+gamma=1e-2", {"optimizer": "adamw", "gamma": 0.01} | EXACT),
        ("muon+nesterov=false", {"optimizer": "muon", "dopr": False, "nesterov": False}),
        ("sgd+momentum=0.9", {"optimizer": "sgd", "dopr": False, "momentum": 0.9}),
    ],
)
def test_a_name_is_settings_of_the_trainer(name, settings):
    variant = parse_variant(name)
    assert dict(variant.settings) == settings
    assert variant.base == settings["optimizer"]


@pytest.mark.parametrize("name", ["adam", "dopr-", "slow-dopr-adamw", ""])
def test_an_unknown_optimizer_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="NAME one of adamw, sgd, signum, muon, adamuon"):
        parse_variant(name)


def test_a_change_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"'gamma' is not of the form key=value"):
        parse_variant("dopr-adamw+gamma")


@pytest.mark.parametrize(
    "change",
    [
        *("lr=1", "seed=1", "max_steps=9", "batch_size=9", "dataset=x", "out_dir=x"),
        *("dopr=true", "optimizer=sgd", "n_layer=3", "block_size=9"),
    ],
)
def test_what_is_the_same_for_all_optimizers_cannot_be_changed_by_one(change):
    with pytest.raises(ValueError, match=f"{change.split('=')[0]} is fixed here"):
        parse_variant(f"adamw+{change}")


def test_an_unknown_setting_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="unknown setting 'gama'; did you mean 'gamma'"):
        parse_variant("dopr-adamw+gama=1")


def test_a_value_of_the_wrong_kind_is_refused():
    with pytest.raises(ValueError, match="gamma='x': must be a number"):
        parse_variant("dopr-adamw+gamma=x")
