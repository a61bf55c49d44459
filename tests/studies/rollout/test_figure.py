"""The figure of the study has the ratios of the leaderboard."""

import numpy as np
import pytest

from studies.rollout.figure import forest, main
from studies.stats.analysis import leaderboard
from tests.studies.rollout.test_tables import with_controls
from tests.studies.small_studies import study, write_study


def drawn(ax):
    """The middles of the intervals, and the fill of their markers."""
    points = [line for line in ax.lines if line.get_marker() not in ("None", "")]
    return {(float(p.get_xdata()[0]), p.get_markerfacecolor() == "white") for p in points}


def test_each_variant_has_its_ratio_and_that_at_its_rate(tmp_path):
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
    assert len(expected) == 4  # of AdamW's and Muon's DoPr; the fast run has two pairs
    assert drawn(ax) == expected
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["dopr-adamw", "fast-dopr-adamw", "dopr-muon"]


def test_each_task_and_length_has_a_panel_and_what_has_not_run_has_none(tmp_path):
    for name, steps in (("pdfa-500", 500), ("nav-500", 500), ("nav-1500", 1500)):  # a corner lacks
        task = name.partition("-")[0]
        own = {"task": task, "spec": f"task:{task}", "steps": steps}
        write_study(tmp_path / name, [each | own for each in study()])
    panels = [ax for ax in forest(tmp_path).axes if ax.get_visible()]
    titles = [ax.get_title("left") for ax in panels]
    assert titles == ["pdfa, 500 steps", "nav, 500 steps", "nav, 1,500 steps"]
    assert [ax.xaxis.get_tick_params()["labelbottom"] for ax in panels] == [True, False, True]
    assert [ax.yaxis.get_tick_params()["labelleft"] for ax in panels] == [True, False, True]


def test_it_is_written_or_says_what_to_run(tmp_path, capsys):
    write_study(tmp_path / "ctrl-500", study())
    main(["--results", str(tmp_path), "--out", str(tmp_path / "ratios.png")])
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="2"):
        main(["--results", str(tmp_path / "nothing")])
    assert "run `python -m studies.rollout.all_stages`" in capsys.readouterr().err
