"""Tests of the command bench.scale_model: its files, its tables and its errors."""

import json
import re
from pathlib import Path

import pytest

from bench import scale_model
from bench.scale import tables
from bench.scale.fits import SIZES
from bench.scale_model import main, placements

pytestmark = pytest.mark.xdist_group("scale")  # its fixtures are slow

RESULTS = Path(__file__).parents[3] / "bench/results"
FEW = ["--models", "124M", "--placements", "ddp", "--gpus", "1", "8"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("scale")
    with pytest.MonkeyPatch.context() as patch:  # that table takes most of the time
        patch.setattr(scale_model, "sensitivity", lambda *_: "")
        assert main([*FEW, "--out", str(out)]) == 0
    return out


def test_the_committed_numbers_agree_with_the_code(written):
    committed = json.loads((RESULTS / "scale_model/estimates.json").read_text())
    written_now = json.loads((written / "estimates.json").read_text())
    assert written_now["hardware"] == committed["hardware"]
    rows = [r for r in committed["rows"] if (r["shape"], r["placement"]) == ("124M", "ddp")]
    assert written_now["rows"] == [row for row in rows if row["gpus"] in (1, 8)]
    assert len(written_now["rows"]) == 12
    memory = [row for row in committed["memory"] if row["shape"] == "124M"]
    assert written_now["memory"] == memory
    assert len(memory) == len(SIZES) + 1
    assert (written / "estimates.png").stat().st_size > 10_000


def test_the_tables_show_the_written_numbers(written, monkeypatch, capsys):
    monkeypatch.setattr(scale_model, "sensitivity", lambda *_: "")
    main([*FEW, "--bases", "adamw", "--out", str(written)])
    rows = json.loads((written / "estimates.json").read_text())["rows"]
    line = next(row for row in capsys.readouterr().out.splitlines() if "| 124M ddp |" in row)
    for gpus, cell in zip((1, 8), line.split("|")[2:4], strict=True):
        written_percents = [100 * row["added"] for row in rows if row["gpus"] == gpus]
        shown = [float(each) for each in cell.split("/")]
        assert shown == pytest.approx(written_percents, rel=0.05)  # of two digits
        assert len(shown) == 3


@pytest.mark.slow  # it estimates large models for many changes of the hardware
def test_the_sensitivity_has_a_row_for_every_change_of_the_hardware(tmp_path, capsys):
    assert main([*FEW, "--bases", "adamw", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for knob in tables.KNOBS:
        (row,) = (row for row in rows if row[0] == knob)
        assert len(row) == 1 + len(tables.POINTS)
        assert all(re.search(r"\d", cell) for cell in row[1:])


@pytest.mark.parametrize("name", ["step_overhead_cpu_128.json", "tiny"])
def test_measured_rows_are_compared_with_the_model(name, tmp_path, capsys):
    path = RESULTS / name
    if name == "tiny":
        path = tmp_path / "tiny.json"
        ms, ratio = ({"base": b, "exact": 3 * b, "sampled": 2 * b} for b in (4.0, 1.0))
        row = {"width": 16, "optimizer": "adamw", "inverse": "newton_schulz", "tokens": 32}
        path.write_text(json.dumps({"rows": [row | {"step_ms": ms, "ratio": ratio}]}))
    assert main(["--measured", str(path), "--mfu", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (2 if name == "tiny" else 4)
    measured = "measured 12 (3.000)" if name == "tiny" else "measured 324 (1.483)"
    assert "exact: model" in lines[0]
    assert lines[0].endswith(measured)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "Invalid JSON"),
        ('{"rows": 3}', "rows: Input should be a valid"),
        ('{"rows": [{"width": 16, "optimizer": "adamw"}]}', "rows.0.step_ms: Field required"),
        ('{"rows": [], "tokens": "32"}', "tokens: .*integer"),
    ],
)
def test_a_damaged_measurement_is_named(content, problem, tmp_path, capsys):
    path = tmp_path / "measured.json"
    path.write_text(content)
    assert main(["--measured", str(path)]) == 2
    assert re.search(f"error: {path}: {problem}", capsys.readouterr().err)


def test_all_numbers_that_are_not_positive_are_in_one_error(capsys):
    assert main(["--network", "0", "--gpus", "0"]) == 2
    assert "error: network=0, gpus=0: must be above 0" in capsys.readouterr().err


def test_nodes_have_whole_gpus(capsys):
    assert main(["--per_node", "0.5"]) == 2
    assert "error: per_node=0.5: must be a whole number" in capsys.readouterr().err


def test_placements_that_do_not_differ_are_left_out():
    found = placements(["ddp", "fsdp", "hsdp"], [1, 8, 12, 16], per_node=8)
    assert [f"{each.parallel} {each.size}" for each in found] == [
        *("ddp 1", "ddp 8", "ddp 12", "ddp 16", "fsdp 8", "fsdp 12", "fsdp 16", "hsdp 16")
    ]
