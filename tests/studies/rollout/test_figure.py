"""Test that the figure of the rollout study shows the ratios of the leaderboard."""

import numpy as np
import pytest

from studies.rollout.figure import forest, main
from studies.stats.analysis import leaderboard
from tests.studies.records import study, write_study
from tests.studies.rollout.test_tables import with_controls


def drawn(ax):
    """Return the middle of each interval, and whether its marker is hollow."""
    points = [line for line in ax.lines if line.get_marker() not in ("None", "")]
    return {(float(p.get_xdata()[0]), p.get_markerfacecolor() == "white") for p in points}


def test_each_variant_has_its_ratio_at_tuned_and_at_equal_rates(tmp_path):
    write_study(tmp_path / "pdfa-500", with_controls())
    (ax,) = forest(tmp_path).axes
    rows = [row for row in leaderboard(with_controls()) if row.versus_base]
    both = {False: "versus_base", True: "at_this_rate"}
    expected = {
        (float(np.exp(found.difference.mean)), hollow)
        for row in rows
        for hollow, key in both.items()
        if (found := getattr(row, key)) and found.difference.n > 2
    }
    assert len(expected) == 4  # of dopr-adamw and dopr-muon; the fast mode has two pairs
    assert drawn(ax) == expected
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["dopr-adamw", "fast-dopr-adamw", "dopr-muon"]


def test_each_task_and_length_that_ran_has_a_panel(tmp_path):
    for name, steps in (("pdfa-500", 500), ("nav-500", 500), ("nav-1500", 1500)):
        task = name.partition("-")[0]
        own = {"task": task, "spec": f"task:{task}", "steps": steps}
        write_study(tmp_path / name, [each | own for each in study()])
    panels = [ax for ax in forest(tmp_path).axes if ax.get_visible()]
    titles = [ax.get_title("left") for ax in panels]
    assert titles == ["pdfa, 500 steps", "nav, 500 steps", "nav, 1,500 steps"]
    assert [ax.xaxis.get_tick_params()["labelbottom"] for ax in panels] == [True, False, True]
    assert [ax.yaxis.get_tick_params()["labelleft"] for ax in panels] == [True, False, True]


def test_the_figure_is_written_and_without_records_the_command_to_run_is_named(tmp_path, capsys):
    write_study(tmp_path / "ctrl-500", study())
    main(["--results", str(tmp_path), "--out", str(tmp_path / "ratios.png")])
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="2"):
        main(["--results", str(tmp_path / "nothing")])
    assert "run `python -m studies.rollout.all_stages`" in capsys.readouterr().err
