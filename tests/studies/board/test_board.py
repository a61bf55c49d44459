"""Test the stages of the board, and its tables and figure on made-up records."""

import json
import re

import pytest
from matplotlib.figure import Figure

from eval.rollout.record import write_records
from studies.board import page
from studies.board.stages import BASES, STAGES, TASKS
from studies.sweep.compare import parse, study_of
from tests.studies.records import SEEDS, record

COSTS = {"adamw": (10.0, 0.5), "fast-dopr-adamw": (11.0, 1.25)}


def runs(variant: str, errors: list[float], role: str = "fresh", lr: float = 0.01):
    return [
        record(variant, seed, error, role=role, lr=lr)
        for seed, error in zip(SEEDS, errors, strict=True)
    ]


@pytest.fixture
def board(tmp_path):
    """Write a board with an optimizer alone, with DoPr, and one whose DoPr is missing."""
    place = tmp_path / "board" / "pdfa"
    place.mkdir(parents=True)
    alone, pair = runs("adamw", [8.0, 4.0, 2.0]), runs("fast-dopr-adamw", [4.0, 2.0, 1.0], lr=0.02)
    control = runs("adamw", [16.0, 8.0, 4.0], "control", lr=0.02)
    write_records(place / "records.jsonl", [*alone, *pair, *control, *runs("sgd", [9.0] * 3)])
    write_records(place / "hidden.jsonl", [*alone, *runs("fast-dopr-adamw", [8.0, 4.0, 2.0])])
    rows = [{"variant": name, "ms": ms, "MiB": mib} for name, (ms, mib) in COSTS.items()]
    (tmp_path / page.LANGUAGE_COSTS).write_text(json.dumps({"rows": rows}))
    return tmp_path


def write(folder) -> None:
    places = {"board": "board", "costs": ".", "figure": "board.png"}
    page.main([word for key, name in places.items() for word in (f"--{key}", str(folder / name))])


def test_a_row_shows_the_gain_at_own_rates_at_equal_rates_and_on_hidden_seeds(board):
    write(board)
    lines = (board / "board" / "tables.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| adamw ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["adamw", "0.01, 0.02", "4.667", "2.333"]
    assert [cell.split()[0] for cell in cells[4:7]] == ["0.500", "0.250", "1.00"]
    assert cells[7:] == ["10.00", "11.00", "0.5000", "1.250"]


def test_an_optimizer_without_its_pair_has_no_row(board):
    write(board)
    assert "sgd" not in (board / "board" / "tables.md").read_text()


def test_the_figure_has_an_arrow_for_each_pair_with_costs(board):
    costs = {name: {"ms": ms, "MiB": mib} for name, (ms, mib) in COSTS.items()}
    (ax,) = page.draw(page.boards(board / "board"), {"pdfa": costs}).axes
    arrow, label = ax.texts
    assert arrow.xy == label.xy == (11.0, pytest.approx(2.0))  # pyright: ignore
    assert arrow.get_position() == (10.0, pytest.approx(4.0))
    assert label.get_text() == "adamw"
    write(board)
    assert (board / "board.png").read_bytes().startswith(b"\x89PNG")


def test_a_metric_that_is_better_if_higher_has_its_own_ratio_and_costs(board):
    def clones(variant, returns):
        metrics = [
            {
                key: {"mean": mean, "lo": mean, "hi": mean, "n": 9}
                for key, mean in (("return", value), ("shortfall", 1 - value / 8))
            }
            for value in returns
        ]
        grades = [{"metrics": each, "curves": {}, "n_t": {}, "samples": []} for each in metrics]
        changes = {"task": "humanoid", "primary": "return", "higher_is_better": True}
        return [
            record(variant, seed, 0.0, grade=grade, **changes)
            for seed, grade in zip(SEEDS, grades, strict=True)
        ]

    place = board / "board" / "humanoid"
    place.mkdir()
    records = [*clones("adamw", [1.0, 2.0, 3.0]), *clones("fast-dopr-adamw", [2.0, 4.0, 6.0])]
    for name in page.FILES:
        write_records(place / name, records)
    rows = [{"variant": name, "ms": 1.5, "MiB": 2.5} for name in COSTS]
    (board / page.CLONES_COSTS).write_text(json.dumps({"rows": rows}))
    write(board)
    text = (board / "board" / "tables.md").read_text()
    lines = text[text.index("## humanoid") :].splitlines()
    heading, row = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (2, 4))
    found = dict(zip(heading[2:9], row[2:9], strict=True))
    assert heading[2:] == [
        *("return alone", "with DoPr", "shortfall, DoPr / alone, own rates", "equal rates"),
        *("hidden seeds", "return, DoPr / alone", "hidden seeds"),
        *("ms a step", "with DoPr", "state, MiB", "with DoPr"),
    ]
    assert found["return alone"] == "2.000"
    assert found["return, DoPr / alone"] == "2.00 [2.00, 2.00]"
    assert row[-4:] == ["1.500", "1.500", "2.500", "2.500"]


def test_names_beside_the_figure_keep_their_order_and_do_not_overlap():
    ax = Figure().subplots()
    ax.set_ylim(0, 1)
    page._label(ax, {"low": (0.5, 0.9), "high": (0.5, 0.99), "middle": (0.5, 0.95)})
    heights = {each.get_text(): each.get_position()[1] for each in ax.texts}
    assert heights["middle"] - heights["low"] == pytest.approx(page.LABEL_GAP)
    assert heights["high"] - heights["middle"] == pytest.approx(page.LABEL_GAP)
    assert heights["high"] <= 1


def test_the_error_of_a_share_of_successes_is_named_as_what_is_missing():
    nav = {"primary": "success", "higher_is_better": True}
    assert page._metric_and_error([nav]) == ("success", "1 − success")
    assert page._metric_and_error([nav | {"primary": "return"}]) == ("return", "shortfall")
    pdfa = {"primary": "jeffreys", "higher_is_better": False}
    assert page._metric_and_error([pdfa]) == ("jeffreys", "jeffreys")


def test_an_empty_board_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        write(tmp_path)
    assert "studies.submit" in capsys.readouterr().err


def test_every_task_compares_every_optimizer_with_dopr_and_without():
    assert len(STAGES) == len(TASKS) * len(BASES)
    assert len({stage.name for stage in STAGES}) == len(STAGES)


@pytest.mark.parametrize("stage", STAGES[:: len(BASES) + 1], ids=lambda stage: stage.name)
def test_compare_accepts_a_stage(stage, tmp_path):
    study = study_of(parse(stage.argv(tmp_path, 1))[1])
    base, pair = study.variants
    assert pair.base == base.name
    assert study.out == tmp_path / stage.name


def test_the_committed_tables_are_those_of_the_committed_records():
    place = page.Path("studies/results/board")
    board = page.boards(place)
    assert page.tables(board, page.costs_of(board, page.COSTS)) == (place / "tables.md").read_text()


def test_the_page_of_the_board_quotes_its_tables():
    quoted = page.Path("docs/leaderboard.md").read_text()
    ratios = re.findall(r"[\d.]+ \[[\d., ]+\]", quoted)
    assert len(ratios) > 10
    tables = page.Path("studies/results/board/tables.md").read_text()
    assert [each for each in ratios if each not in tables] == []


def test_missing_costs_are_named_and_nothing_is_written(board, capsys):
    (board / page.LANGUAGE_COSTS).unlink()
    with pytest.raises(SystemExit):
        write(board)
    assert "board_costs.json has no costs; run bench.board_costs" in capsys.readouterr().err
    assert not (board / "board.png").exists()
