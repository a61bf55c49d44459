"""Test that the rules agree with the preconditioner and with their definitions."""

import pytest
import torch
from torch import nn

from optim import ActivationPreconditioner
from studies.fresh_mean.interventions import (
    RULES,
    Intervention,
    Moments,
    kept,
    measure,
    rotated,
)


def train(rule=None, steps=3, **settings):
    """Return the weights after some steps with a rule, or with the preconditioner."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if settings:
        ActivationPreconditioner(model, **settings).attach(optimizer)
    with Intervention(RULES[rule or "base"]) as intervention:
        for _ in range(steps):
            x = torch.randn(4, 11, 5, dtype=torch.float64) + 2
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return list(model.parameters()), intervention


@pytest.mark.parametrize(("rule", "settings"), [("base", {}), ("exact", {"gamma": 0.1})])
def test_the_exact_rule_equals_the_preconditioner(rule, settings):
    for own, expected in zip(train(rule)[0], train(**settings)[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-9)


def moments(d=6):
    torch.manual_seed(0)
    A = torch.randn(d, d, dtype=torch.float64)
    mean, *others = torch.randn(4, d, dtype=torch.float64)
    return Moments(mean, A @ A.mT, *others, averaged_covariance=A.mT @ A)


def test_each_rule_keeps_the_part_that_its_name_says():
    z, G = moments(), torch.randn(4, 6, dtype=torch.float64)
    unit = z.mean / z.mean.norm()
    assert (RULES["mean removed"](G, z) @ unit).abs().max() < 1e-12
    assert (RULES["stale mean removed"](G, z) @ z.previous_mean).abs().max() < 1e-12
    m = z.mean_eigenvalue
    dense = (z.C + 0.1 * m * torch.eye(6, dtype=torch.float64)).inverse() * m
    torch.testing.assert_close(RULES["no mean"](G, z), G @ dense)
    alone = RULES["mean alone"](G, z)
    other = G - torch.outer(G @ unit, unit)
    across = alone - torch.outer(alone @ unit, unit)
    torch.testing.assert_close(
        across / other, torch.full_like(G, float(across[0, 0] / other[0, 0]))
    )


@pytest.mark.parametrize("degrees", [1, 30])
def test_a_rotation_turns_by_its_angle(degrees):
    mean = moments().mean
    turned = rotated(mean, degrees)
    cosine = (mean @ turned) / (mean.norm() * turned.norm())
    assert torch.rad2deg(cosine.acos()) == pytest.approx(degrees)
    assert turned.norm() == pytest.approx(float(mean.norm()))


def test_the_suppression_is_the_ratio_of_what_passes_without_and_with_the_mean():
    z = moments()
    passes = [z.whiten(z.mean[None], mean).norm() for mean in (0 * z.mean, z.mean)]
    suppression = measure(torch.randn(4, 6, dtype=torch.float64), z)["suppression"]
    assert suppression == pytest.approx(float(passes[0] / passes[1]))


def test_every_layer_is_measured_in_every_tenth_step():
    _, intervention = train("base", steps=20)
    assert [(row["step"], row["layer"]) for row in intervention.measured] == [
        (9, 0),
        (9, 1),
        (19, 0),
        (19, 1),
    ]
    for row in intervention.measured:
        assert 0 < row["gradient_share"] < 1
        assert 0 < row["mean_share"] < 1
        assert row["suppression"] > 1
        assert row["leak"] > 1
        assert row["turn_10"] > 0


def test_a_finished_run_is_kept_and_a_stopped_one_begins_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("of a stopped run")

    def make(own):
        assert not own.exists()
        return {"loss": 1.5}

    assert kept(folder, make) == kept(folder, lambda own: {}) == {"loss": 1.5}
