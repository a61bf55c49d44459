"""The comparison of step times with other preconditioners, in a tiny version."""

import json
import sys

import pytest
import torch
from torch import nn

from bench import peers
from model import GPT, GPTConfig


def test_every_variant_is_timed_and_compared_with_adamw(monkeypatch, tmp_path, capsys):
    out = tmp_path / "peers.json"
    arguments = ["--preset", "tiny", "--rounds", "1", "--widths", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["peers", *arguments])
    peers.main()
    rows = json.loads(out.read_text())["rows"]
    names = {"AdamW", "DoPr, exact", "DoPr, fast", "SOAP", "Shampoo", "Kron", "K-FAC"}
    (row,) = rows
    assert row["width"] == 8
    assert names < row["step_ms"].keys()
    assert row["ratio"]["AdamW"] == 1
    assert all(ms > 0 for ms in row["step_ms"].values())
    assert capsys.readouterr().out.count("K-FAC") == 1


def test_k_fac_trains_the_matrices_and_renews_its_factors():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=32, block_size=8, n_layer=1, n_head=2, n_embd=16, bias=False))
    optimizers = peers.kfac(model)
    weight = model.transformer.h[0].mlp.c_fc.weight
    x = torch.randint(32, (4, 8))
    losses = []
    for _ in range(25):
        before = weight.detach().clone()
        _, loss = model(x, x)
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        losses.append(loss.item())
        assert not torch.equal(weight, before)
    assert losses[-1] < losses[0]
    held = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    assert len(held) == len({*held}) == len(list(model.parameters()))


def test_without_singd_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "singd.optim.optimizer", None)
    with pytest.raises(ValueError, match="K-FAC needs pip install singd"):
        peers.kfac(nn.Linear(2, 2))
