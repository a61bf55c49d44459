"""Names of optimizers in comparisons."""

import pytest

from eval.variants import parse_variant


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adamw", {"optimizer": "adamw", "dopr": False}),
        ("dopr-muon", {"optimizer": "muon", "dopr": True, "refresh_every": 1}),
        (
            "fast-dopr-sgd",
            {"optimizer": "sgd", "dopr": True, "refresh_every": 10, "sigma_beta": 0.95},
        ),
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
