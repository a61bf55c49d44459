"""Test the measurement of what a step of the board's optimizers costs."""

import json
import sys

import pytest
import torch

from bench import board_costs
from bench.board_costs import state_bytes


def test_the_state_counts_every_tensor_once():
    weight = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    assert state_bytes([optimizer]) == 2 * weight.nbytes + 4  # two moments and the step
    state = optimizer.state[weight]
    state["more"] = [state["exp_avg"], (torch.zeros(2, dtype=torch.float64),)]
    assert state_bytes([optimizer]) == 2 * weight.nbytes + 4 + 16


@pytest.mark.parametrize("task", ["pdfa", "humanoid"])
def test_dopr_adds_time_and_memory(task, tmp_path, monkeypatch):
    out = tmp_path / "costs.json"
    argv = ["board_costs", "--rounds", "1", "--bases", "sgd", "--task", task, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    board_costs.main()
    alone, pair = json.loads(out.read_text())["rows"]
    assert (alone["variant"], pair["variant"]) == ("sgd", "fast-dopr-sgd")
    assert 0 < alone["MiB"] < pair["MiB"]
    assert alone["ms"] > 0 < pair["ms"]
