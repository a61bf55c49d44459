"""Test optima, shifts and regrets, on sweeps whose answers are known."""

import math

import pytest

from studies.mup.figures import ratio_figure, transfer_figure
from studies.mup.tables import judge, ratio_text, steps_at_peak, tables
from studies.mup.transfer import (
    losses_by_width,
    optimum,
    regret,
    shift,
    steps_where_wider_is_worse,
    tuned,
)
from studies.stats.seeds import over_seeds
from tests.studies.mup.width_records import WIDTHS, record, sweep


def optima(records):
    return {width: optimum(losses) for width, losses in losses_by_width(records).items()}


@pytest.mark.parametrize("drift", [0.0, -0.3, -1.0])
def test_the_optimum_of_a_parabola_is_found_between_two_rates(drift):
    for width, best in optima(sweep(drift)).items():
        assert best.kind == "fit"
        assert best.log2_lr == pytest.approx(-10 + drift * math.log2(width / 256))
        assert best.loss == pytest.approx(3)
    assert shift(optima(sweep(drift))) == pytest.approx(3 * drift)


def test_an_optimum_at_the_edge_of_the_grid_is_unknown_and_has_no_shift():
    records = [each for each in sweep(-1.0) if each["lr"] <= 2**-9]  # width 32 wants 2^-7
    assert optima(records)[32].kind == "edge"
    assert optima(records)[256].kind == "fit"
    assert math.isnan(shift(optima(records)))


def test_next_to_a_diverged_rate_the_optimum_is_the_best_rate_that_ran():
    losses = {2**-4: 3.2, 2**-3: 3.0, 2**-2: math.inf}
    assert (optimum(losses).log2_lr, optimum(losses).kind) == (-3, "grid")
    assert optimum({2**-4: math.inf, 2**-3: math.inf, 2**-2: math.inf}).kind == "edge"


def test_regret_is_the_excess_loss_at_the_rate_of_another_width():
    losses = losses_by_width(sweep(-1.0, bowl=0.05))
    assert tuned(losses[256]) == 2**-10
    assert tuned(losses[32]) == 2**-7
    assert regret(losses[32], 2**-10) == pytest.approx(0.05 * 3**2 / 3)  # three octaves off, of 3
    assert regret(losses[256], 2**-10) == 0
    assert math.isnan(regret(losses[256], 2**-20))
    assert regret({2**-4: 3.0, 2**-3: math.inf}, 2**-3) == math.inf


def test_a_rate_that_lacks_a_seed_or_diverges_on_one_is_not_the_best():
    records = [record(32, 2.0**x, seed, val_loss=3 + x * x) for x in (-1, 0, 1) for seed in (0, 1)]
    records.append(record(32, 4.0, 0, val_loss=1.0))
    assert 4.0 not in losses_by_width(records)[32]
    records.append(record(32, 4.0, 1, val_loss=None))
    assert losses_by_width(records)[32][4.0] == math.inf


def curved(per_width):
    """Return three seeds whose losses change with the width, with a warm-up and a bad step."""
    return [
        record(width, 2**-10, seed, curve=[[5, width], [20, loss], [40, loss], [60, None]])
        for width in WIDTHS
        for seed in range(3)
        for loss in [4 + per_width * width + seed / 10]
    ]


def test_steps_at_which_a_wider_model_is_worse_are_counted_after_the_warmup():
    assert steps_where_wider_is_worse(curved(-0.01), 2**-10, 10) == (0, 6)
    assert steps_where_wider_is_worse(curved(+0.01), 2**-10, 10) == (6, 6)
    assert steps_where_wider_is_worse(curved(+0.01), 2**-9, 10) == (0, 0)  # no run at that rate
    assert steps_where_wider_is_worse(curved(+0.01)[::3], 2**-10, 10) == (0, 0)  # one seed


@pytest.mark.parametrize(
    ("moved", "cost", "is_mup", "words"),
    [
        (0.4, 0.005, True, "transfers"),
        (1.2, 0.005, True, "DOES NOT TRANSFER"),
        (0.4, 0.02, True, "DOES NOT TRANSFER"),
        (-2.5, 0.08, False, "drifts, as a control should"),
        (-1.0, 0.08, False, "DOES NOT DRIFT"),
        (-2.5, 0.01, False, "DOES NOT DRIFT"),
        (math.nan, 0.01, True, "open: an optimum is at the edge"),
        (0.0, math.nan, True, "open: the lr did not run at every width"),
    ],
)
def test_a_verdict_depends_on_shift_and_regret(moved, cost, is_mup, words):
    assert judge(moved, cost, octaves=3, is_mup=is_mup).startswith(words)


def test_the_tables_show_that_muP_transfers_and_that_sp_drifts():
    mup = sweep(0.1)
    sp = sweep(-1.0, settings={"mup": False})
    text = tables([*mup, *sp])
    assert "| adamw | mup | +0.30 over 8x | 0.00% |" in text
    assert "| adamw | sp | -3.00 over 8x | 15.00% |" in text
    assert "transfers" in text
    assert "drifts, as a control should" in text
    assert "| adamw | sp | 256 | -10.00 | 3.0000 | 15.00% | 0.00% |" in text


BEST = 2**-10


@pytest.mark.parametrize(
    ("is_kept", "words"),
    [
        (lambda r: True, ["| transfers |"]),
        (lambda r: r["width"] == 256, ["open: less than 4x of width"]),
        (lambda r: r["width"] >= 128, ["open: less than 4x of width"]),
        (
            lambda r: r["width"] != 64 or r["lr"] <= BEST,
            ["| +0.00 over 8x | 0.00% |", "open: an optimum is at the edge of the grid"],
        ),
        (
            lambda r: r["width"] != 64 or r["lr"] != BEST,
            ["| +0.00 over 8x | unknown |", "open: the lr did not run at every width"],
        ),
        (lambda r: r["lr"] == BEST, ["| adamw | mup | unknown | 0.00% |", "one lr, no sweep"]),
    ],
    ids=["all", "one width", "two widths", "edge", "missing rate", "one rate"],
)
def test_a_verdict_stays_open_without_enough_widths_and_rates(is_kept, words):
    text = tables([*filter(is_kept, sweep(0.0))])
    assert all(each in text for each in words)


def test_the_update_ratio_is_judged_only_after_it_has_settled():
    flat, falling = over_seeds([0.05]), over_seeds([-0.5])
    assert ratio_text(flat, "independent", 5.0, is_mup=True).endswith("(passes)")
    assert ratio_text(falling, "independent", 5.0, is_mup=True).endswith("(FAILS)")
    assert ratio_text(falling, "constant", 5.0, is_mup=True).endswith("(passes)")
    assert ratio_text(flat, "constant", 5.0, is_mup=True).endswith("(FAILS)")
    assert ratio_text(flat, "constant", 0.1, is_mup=True) == "+0.05"


def test_steps_are_weighted_by_the_schedule():
    settings = {"schedule": "constant", "warmup_steps": 0, "max_steps": 50, "min_lr_ratio": 0.0}
    assert steps_at_peak(settings) == 50
    assert steps_at_peak(settings | {"warmup_steps": 9}) == pytest.approx(50 - 4.5)
    assert steps_at_peak(settings | {"schedule": "cosine"}) == pytest.approx(25.5)


def test_the_figures_have_a_panel_for_each_parametrisation_and_a_line_for_each_width():
    both = sweep(0.1) + sweep(-1.0, settings={"mup": False})
    rows = [each | {"update_ratio": each["lr"]} for each in both]
    figure = transfer_figure(rows)
    assert len(figure.axes) == 2
    assert {len(ax.lines) for ax in figure.axes} == {2 * len(WIDTHS)}  # a curve and its optimum
    assert len(ratio_figure(rows).axes) == 2
