"""bench/speed_figures.py on made-up results."""

import json
import sys

import pytest

from bench import speed_figures
from bench.process import ROOT

PEERS = [
    {"width": 128, "ratio": {"AdamW": 1.0, "DoPr, exact": 1.25, "SOAP": 2.5}},
    {"width": 512, "ratio": {"AdamW": 1.0, "DoPr, exact": 1.5, "SOAP": 4.0}},
]
GENERATION = [{"size": "demo", "dtype": "float32", "batch": 16, "mode": "greedy", "ratio": 1.75}]
THROUGHPUT = [{"step_ms": {"ours": [10.0, 20.0], "nanogpt": [11.0, 19.0]}}]


@pytest.fixture
def results(tmp_path):
    names = ("peers_cpu", "generation_cpu", "train_throughput_cpu")
    for name, rows in zip(names, (PEERS, GENERATION, THROUGHPUT), strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    return tmp_path


def draw(monkeypatch, results, out):
    arguments = ["speed_figures", f"--results={results}", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", arguments)
    speed_figures.main()


def test_every_result_becomes_a_figure_with_its_names_and_ratios(monkeypatch, results):
    draw(monkeypatch, results, results)
    names = ("step_cost", "generation", "throughput")
    step, generation, throughput = ((results / f"{name}.svg").read_text() for name in names)
    assert "DoPr, exact" in step
    assert "SOAP" in step
    assert "demo float32 16 greedy" in generation
    assert "1.75" in generation
    assert "0.95" in throughput


def test_the_lines_are_the_ratios_of_each_width():
    (ax,) = speed_figures.step_cost(PEERS).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert lines["DoPr, exact"] == [1.25, 1.5]
    assert lines["SOAP"] == [2.5, 4.0]
    assert "AdamW" not in lines


def test_a_missing_result_is_named(monkeypatch, results, capsys):
    (results / "generation_cpu.json").unlink()
    with pytest.raises(SystemExit):
        draw(monkeypatch, results, results)
    assert "generation_cpu.json" in capsys.readouterr().err


def test_the_committed_results_can_be_drawn(monkeypatch, tmp_path):
    draw(monkeypatch, ROOT / "bench/results", tmp_path)
    assert "DoPr, sampled, fresh mean" in (tmp_path / "step_cost.svg").read_text()
    assert "gpt2 float32 16 greedy" in (tmp_path / "generation.svg").read_text()
    assert "round 5" in (tmp_path / "throughput.svg").read_text()
