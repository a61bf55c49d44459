"""Test the names of optimizers in comparisons."""

import pytest

from studies.sweep.variants import EXACT, FAST, parse_variant, split


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
    assert dict(parse_variant(name).settings) == settings


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("adamw", "adamw"),
        ("dopr-adamw", "adamw"),
        ("fast-dopr-muon+gamma=1+include=*.attn.*", "muon"),
        ("dopr-sgd+momentum=0", "sgd+momentum=0"),
        ("sgd+momentum=0", "sgd+momentum=0"),
        ("fast-dopr-soap+eps=1e-6+gamma=1", "soap+eps=1e-6"),
        ("mars+gamma=0.05", "mars+gamma=0.05"),  # its own
        ("dopr-mars+gamma=0.05", "mars"),  # DoPr's
    ],
)
def test_the_base_is_the_same_without_dopr_and_its_settings(name, base):
    assert parse_variant(name).base == base
    assert parse_variant(base).base == base


def test_a_class_takes_its_own_arguments_and_settings_of_train():
    variant = parse_variant("fast-dopr-lion+betas=(0.9,0.95)+foreach=true+weight_decay=0")
    arguments = {"optimizer_args": "betas=(0.9,0.95),foreach=true", "weight_decay": 0.0}
    assert dict(variant.settings) == {"optimizer": "lion"} | FAST | arguments
    assert parse_variant("torch:muon").has_aux
    assert not parse_variant("torch:nadam").has_aux


def test_a_list_is_split_outside_of_parentheses():
    assert split("adamw,lion+betas=(0.9,0.95),muon") == ["adamw", "lion+betas=(0.9,0.95)", "muon"]
    assert split("adamw") == ["adamw"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *(
            (name, "NAME is one of adamw, sgd")
            for name in ("adamm", "dopr-", "slow-dopr-adamw", "")
        ),
        ("dopr-adamw+gamma", "'gamma' is not of the form key=value"),
        ("dopr-adamw+gama=1", "unknown setting 'gama'; did you mean 'gamma'"),
        ("soap+precondition_freq=5", "'precondition_freq'; did you mean 'precondition_frequency'"),
        ("lion+betas=5", "Lion fails on three small parameters"),
        ("lbfgs", "through a closure"),
        ("dopr-adamw+gamma=x", "gamma='x': must be a number"),
        ("adamw+beta1=0.9+beta1=0.8", "beta1 is given more than once"),
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
