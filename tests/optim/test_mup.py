"""What the factors of mup.py do to a step: its effect is the same at every width."""

import math

import pytest
import torch
from torch import nn

from optim.build import build_optimizers

NUMBERS = {"lr": 0.1, "momentum": 0.9, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
BASE, WIDTHS = 32, (32, 128, 512)
ATOL = 0.1  # of a slope over 16x; rules differ by 1/2, one random matrix a width by 0.06
RULES = {
    "adamw": {},
    "signum": {},
    "sgd": {},
    "muon match_rms_adamw": {"adjust_lr": "match_rms_adamw"},
    "muon spectral": {"adjust_lr": "spectral"},
    "muon original": {"adjust_lr": "original"},
    "adamuon": {},
}
SHIFTS = {"adamw": 1, "signum": 1, "sgd": 0, "muon match_rms_adamw": 0.5, "adamuon": 0.5}


def layer(width, rule, *, has_rules=True, **changes):
    """A hidden matrix (2 d, d) and the optimizer that trains it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 2 * width, bias=False))
    settings = NUMBERS | {"optimizer": rule.split()[0], "weight_decay": 0.0} | RULES[rule] | changes
    (optimizer,) = build_optimizers(model, **settings, width_mult=width / BASE if has_rules else 1)
    return model[0], optimizer


def move(width, rule, **changes):
    """RMS of what a step on a gradient δ zᵀ changes in W z; δ is of size 1/d, as under muP.

    AdaMuon's gradient has full rank: with rank one its first step is that of Signum.
    """
    linear, optimizer = layer(width, rule, **changes)
    z, delta = torch.randn(width).sign(), torch.randn(2 * width).sign() / width
    before = linear(z).detach()
    linear.weight.grad = torch.outer(delta, z)
    if rule == "adamuon":
        linear.weight.grad = torch.randn(2 * width, width) / width
    optimizer.step()
    return (linear(z) - before).square().mean().sqrt().item()


def slope(values):
    return math.log2(values[-1] / values[0]) / math.log2(WIDTHS[-1] / WIDTHS[0])


@pytest.mark.parametrize("rule", RULES)
def test_a_step_moves_activations_as_much_at_every_width(rule):
    assert slope([move(width, rule) for width in WIDTHS]) == pytest.approx(0, abs=ATOL)


@pytest.mark.parametrize("rule", RULES)
def test_without_the_rules_it_moves_wider_layers_more(rule):
    found = slope([move(width, rule, has_rules=False) for width in WIDTHS])
    assert found == pytest.approx(SHIFTS.get(rule, 0), abs=ATOL)


DECAYS = {"independent": 1, "constant": 0, "sqrt": 0.5, "inv_width": -1}


@pytest.mark.parametrize("mode", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_weight_decay_follows_the_width_as_asked(rule, mode):
    m, update = 4, 4 ** -SHIFTS.get(rule, 0)
    wanted = 1 if mode == "independent" else update * m ** DECAYS[mode]
    linear, optimizer = layer(m * BASE, rule, wd_scaling=mode, weight_decay=0.5)
    before = linear.weight.detach().clone()
    linear.weight.grad = torch.zeros_like(linear.weight)
    optimizer.step()
    torch.testing.assert_close(linear.weight, before * (1 - 0.1 * 0.5 * wanted))


class Everything(nn.Module):
    """One parameter of every role, two of the matrices fused."""

    def __init__(self):
        super().__init__()
        self.wte, self.ln = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.c_attn, self.lm_head = nn.Linear(8, 24), nn.Linear(8, 11, bias=False)


def rates(optimizer, **changes):
    """The peak rate of every role, with the number of blocks that a matrix has."""
    model = Everything()
    built = build_optimizers(
        model, optimizer=optimizer, **NUMBERS, weight_decay=0.1, width_mult=4, **changes
    )
    groups = [group for each in built for group in each.param_groups]
    assert all(group["lr"] == group["base_lr"] for group in groups)
    return {group["role"]: group["base_lr"] * group.get("lr_mult", 1) for group in groups}


def test_only_the_matrices_rate_falls_and_only_that_of_sgd_grows_elsewhere():
    others = ("embedding", "head", "gain", "bias")
    assert rates("adamw") == {"matrix": 0.025, **dict.fromkeys(others, 0.1)}
    assert rates("signum") == {"matrix": 0.025, **dict.fromkeys(others, 0.1)}
    assert rates("sgd") == {"matrix": 0.1, **dict.fromkeys(others, 0.4)}
    assert rates("muon") == {"matrix": 0.05, **dict.fromkeys(others, 6e-4)}


def test_sgds_matrices_alone_have_another_rule_behind_preconditioning():
    assert rates("sgd", dopr=True) == rates("sgd") | {"matrix": 0.1 * 4**0.8}
    for name in ("adamw", "signum", "muon", "adamuon"):
        assert rates(name, dopr=True) == rates(name)


def test_eps_follows_what_it_is_added_to():
    for name, wanted in (("adamw", [2.5e-9]), ("adamuon", [5e-9, 2.5e-9])):
        built = build_optimizers(
            Everything(), optimizer=name, **NUMBERS, weight_decay=0.1, width_mult=4
        )
        assert [each.param_groups[0]["eps"] for each in built] == wanted
