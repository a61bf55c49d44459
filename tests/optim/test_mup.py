"""With the width rules of optim/mup.py, a step has the same effect at every width."""

import math

import pytest
import torch
from torch import nn

from optim.build import build_optimizers

NUMBERS = {"lr": 0.1, "momentum": 0.9, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
BASE, WIDTHS = 32, (32, 128, 512)
ATOL = 0.1  # of a slope over 16x in width; rules differ by 1/2, random matrices by 0.06
RULES = {
    "adamw": {},
    "signum": {},
    "sgd": {},
    "muon match_rms_adamw": {"adjust_lr": "match_rms_adamw"},
    "muon unit_rms_norm": {"adjust_lr": "unit_rms_norm"},
    "muon original": {"adjust_lr": "original"},
    "adamuon": {},
}
SHIFTS = {"adamw": 1, "signum": 1, "sgd": 0, "muon match_rms_adamw": 0.5, "adamuon": 0.5}


def layer(width, rule, *, has_rules=True, **changes):
    """Return a hidden layer with a weight (2 d, d) and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 2 * width, bias=False))
    settings = NUMBERS | {"optimizer": rule.split()[0], "weight_decay": 0.0} | RULES[rule] | changes
    (optimizer,) = build_optimizers(model, **settings, width_mult=width / BASE if has_rules else 1)
    return model[0], optimizer


def move(width, rule, **changes):
    """Return the RMS change of W z in a step with the gradient δ zᵀ; δ scales with 1/d under muP.

    For AdaMuon, the gradient has full rank, because its first step on rank one equals Signum's.
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
def test_without_the_rules_a_step_moves_wider_layers_more(rule):
    found = slope([move(width, rule, has_rules=False) for width in WIDTHS])
    assert found == pytest.approx(SHIFTS.get(rule, 0), abs=ATOL)


DECAYS = {"independent": 1, "constant": 0, "sqrt": 0.5, "inv_width": -1}


@pytest.mark.parametrize("mode", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_weight_decay_follows_the_width_as_asked(rule, mode):
    m, update = 4, 4 ** -SHIFTS.get(rule, 0)
    expected = 1 if mode == "independent" else update * m ** DECAYS[mode]
    linear, optimizer = layer(m * BASE, rule, wd_scaling=mode, weight_decay=0.5)
    before = linear.weight.detach().clone()
    linear.weight.grad = torch.zeros_like(linear.weight)
    optimizer.step()
    torch.testing.assert_close(linear.weight, before * (1 - 0.1 * 0.5 * expected))


class AllRoles(nn.Module):
    """A model with parameters of every role."""

    def __init__(self):
        super().__init__()
        self.wte, self.ln = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.c_attn, self.lm_head = nn.Linear(8, 24), nn.Linear(8, 11, bias=False)


def peak_rates(optimizer, **changes):
    """Return the peak learning rate of every role."""
    model = AllRoles()
    built = build_optimizers(
        model, optimizer=optimizer, **NUMBERS, weight_decay=0.1, width_mult=4, **changes
    )
    groups = [group for each in built for group in each.param_groups]
    assert all(group["lr"] == group["base_lr"] for group in groups)
    return {group["role"]: group["base_lr"] * group.get("lr_mult", 1) for group in groups}


def test_matrix_rates_fall_and_only_sgd_raises_the_other_rates():
    others = ("embedding", "head", "gain", "bias")
    assert peak_rates("adamw") == {"matrix": 0.025, **dict.fromkeys(others, 0.1)}
    assert peak_rates("signum") == {"matrix": 0.025, **dict.fromkeys(others, 0.1)}
    assert peak_rates("sgd") == {"matrix": 0.1, **dict.fromkeys(others, 0.4)}
    assert peak_rates("muon") == {"matrix": 0.05, **dict.fromkeys(others, 6e-4)}


def test_preconditioning_changes_only_the_rule_of_sgd_matrices():
    assert peak_rates("sgd", dopr=True) == peak_rates("sgd") | {"matrix": 0.1 * 4**0.8}
    for name in ("adamw", "signum", "muon", "adamuon"):
        assert peak_rates(name, dopr=True) == peak_rates(name)


def test_eps_follows_what_it_is_added_to():
    for name, expected in (("adamw", [2.5e-9]), ("adamuon", [5e-9, 2.5e-9])):
        built = build_optimizers(
            AllRoles(), optimizer=name, **NUMBERS, weight_decay=0.1, width_mult=4
        )
        assert [each.param_groups[0]["eps"] for each in built] == expected
