"""Test that the figures show every run once and change no global state."""

import gc
import weakref

import matplotlib
import numpy as np
import pytest

from studies.report.figures import draw
from studies.report.style import COLOURS, looks, svg
from tests.studies.records import SEEDS, fresh, graded, study, tuning


def points(ax, *, hollow):
    """Return the sorted (x, y) of all hollow or of all filled markers."""
    lines = [line for line in ax.lines if line.get_marker() != "None"]
    found = [line.get_xydata() for line in lines if (line.get_mfc() == "none") == hollow]
    return sorted(map(tuple, np.concatenate(found).tolist()))


def test_the_scatter_has_a_dot_for_each_finished_run_and_tuning_runs_are_hollow():
    (ax,) = draw(study())["validation"].axes
    runs = [record for record in study() if record["grade"]]
    for role, hollow in (("fresh", False), ("tuning", True)):
        own = [record for record in runs if record["role"] == role]
        values = [record["grade"]["metrics"]["accumulated_kl"]["mean"] for record in own]
        losses = [record["val_loss"] for record in own]
        assert points(ax, hollow=hollow) == sorted(zip(losses, values, strict=True))


METRICS = {  # (primary metric, higher is better): function of the rollout error
    ("accumulated_kl", False): lambda error: error,
    ("accumulated_kl", True): lambda error: 1 - error,
    ("log10_deviation", False): np.log10,
}


@pytest.mark.parametrize(("name", "higher"), METRICS)
def test_the_fit_runs_through_the_base_runs(name, higher):
    losses, metric = np.linspace(1, 2, 12), METRICS[name, higher]
    rows = []
    for i, x in enumerate(losses.tolist()):
        value = float(metric(x**2 / 20))  # log error is linear in the log loss: an exact fit
        base, how = ("muon", "adamw")[i % 2], {"primary": name, "higher_is_better": higher}
        run = graded(base, i // 2, value, val_loss=x, **how)
        run["grade"]["metrics"][name] = run["grade"]["metrics"]["accumulated_kl"]
        rows.append(run)
    (ax,) = draw(rows)["validation"].axes
    (line,) = [line for line in ax.lines if line.get_label() == "fit"]
    assert line.get_ydata() == pytest.approx(metric(line.get_xdata() ** 2 / 20))


def test_curves_have_a_row_for_each_quantity_and_a_column_for_each_base():
    figure = draw(study())["curves"]
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["adamw", "muon", "", ""]
    # Each curve of B has a thin line on the data's contexts beside it.
    assert [len(ax.lines) for ax in figure.axes] == [6, 4, 3, 2]
    assert [len(ax.collections) for ax in figure.axes] == [2, 2, 2, 2]  # no band of two runs
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_a_curve_is_the_mean_over_the_finished_runs():
    ax = draw(study())["curves"].axes[0]
    ends = {line.get_label(): line.get_ydata()[-1] for line in ax.lines if line.get_linewidth() > 1}
    assert ends == pytest.approx({"base": 6.0, "DoPr": 12.1 / 3, "fast DoPr": 5.75})


def test_curves_that_end_decades_apart_are_averaged_by_their_logarithms():
    rows = [*fresh("muon", [1e-4, 1e-2, 1.0]), *fresh("dopr-muon", [1e-6, 1e-5, 1e-4])]
    rows[0]["grade"]["curves"]["G"]["mean"] = (1e-19, 1e-5, 1e-5, 1e-5)
    b, g = draw(rows)["curves"].axes
    ends = {line.get_label(): line.get_ydata()[-1] for line in b.lines if line.get_linewidth() > 1}
    assert ends == pytest.approx({"base": 1e-2, "DoPr": 1e-5})  # geometric means
    lowest = [band.get_paths()[0].vertices[:, 1].min() for band in b.collections]
    assert min(lowest) > 0
    assert g.get_yscale() == "log"
    assert 1e-10 < g.get_ylim()[0] < 1e-6  # far above the value at the first step


def test_a_sweep_has_a_ring_at_the_chosen_rate_and_a_cross_at_a_diverged_one():
    ax = draw(study())["sweeps"].axes[0]
    rings = [line.get_xydata().tolist() for line in ax.lines if line.get_markersize() == 10]
    assert rings == [[[0.01, 0.5]], [[0.01, 0.4]]]
    (cross,) = [line for line in ax.lines if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [0.02]
    assert ax.get_xscale() == "log"


def test_only_figures_with_data_are_drawn():
    rows = [graded("muon", 7, 4.0, role="single"), graded("dopr-muon", 7, 3.0, role="single")]
    assert list(draw(rows)) == ["curves"]  # two runs make no scatter plot
    rows = [*tuning("muon", {0.01: 0.5}), *fresh("muon", [4.0] * len(SEEDS))]
    for record in rows:
        record["grade"]["curves"] = {}
    assert list(draw(rows)) == ["validation", "sweeps"]


def test_values_far_apart_have_a_logarithmic_axis():
    near, far = (
        draw(fresh("muon", [1.0, 2.0, last]))["validation"].axes[0] for last in (3.0, 30.0)
    )
    assert (near.get_yscale(), far.get_yscale()) == ("linear", "log")


def test_a_base_has_the_same_colour_in_all_reports_and_a_new_base_another_one():
    some = looks([*fresh("muon", [1.0] * 3), *fresh("dopr-muon", [1.0] * 3)])
    assert {look.colour for look in some.values()} == {COLOURS["muon"]}
    assert looks([*study(), *fresh("lion", [1.0] * 3)])["lion"].colour not in COLOURS.values()


def test_modes_differ_in_marker_and_dashes():
    names = ["muon", "dopr-muon", "fast-dopr-muon", "dopr-muon+gamma=1", "dopr-muon+gamma=0.01"]
    found = looks([record for name in names for record in fresh(name, [1.0] * 3, base="muon")])
    assert len({look.marker for look in found.values()}) == len(names)
    assert len({look.dashes for look in found.values()}) == len(names)
    assert found["dopr-muon+gamma=1"].mode == "DoPr, gamma=1"


def test_figures_are_freed_and_the_settings_of_matplotlib_are_kept():
    before = dict(matplotlib.rcParams)
    figures = draw(study())
    for figure in figures.values():
        svg(figure)
    left = [weakref.ref(figure) for figure in figures.values()]
    del figures, figure
    gc.collect()
    assert [each() for each in left] == [None] * len(left)
    assert dict(matplotlib.rcParams) == before
