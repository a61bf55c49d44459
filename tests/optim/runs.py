"""Training runs as a tuple of three objects: model, optimizer, preconditioner."""

import io

import torch

from optim import ActivationPreconditioner
from optim.adamuon import AdaMuon
from optim.muon import Muon
from optim.signum import Signum
from tests.optim.models import backward, mlp

LAZY = {"refresh_every": 4, "collect_every": 2, "sigma_beta": 0.9, "token_stride": 3}


def matrices(model, **kwargs):
    return {"params": [p for p in model.parameters() if p.dim() == 2], **kwargs}


BASES = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "muon": lambda model: Muon([matrices(model)], lr=1e-2),
    "adamuon": lambda model: AdaMuon([matrices(model)], lr=1e-2),
    "signum": lambda model: Signum(model.parameters(), lr=1e-2),
}


def made(base="sgd", **settings):
    """Return a model, its optimizer and its preconditioner."""
    model = mlp()
    optimizer = BASES[base](model)
    settings = {"gamma": 0.1} | settings
    preconditioner = ActivationPreconditioner(model, **settings).attach(optimizer)
    return model, optimizer, preconditioner


def train(parts, steps):
    """Train on the batches with these numbers."""
    model, optimizer, _ = parts
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def resumed(parts, base="sgd", **settings):
    """Save a run to a file and load it into new objects."""
    file, again = io.BytesIO(), made(base, **settings)
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    return again


def assert_same(first, second):
    """Assert that the weights, Σ, P and reports of two runs are bit-equal."""
    for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first[2].layers, second[2].layers, strict=True):
        assert torch.equal(a.sigma, b.sigma)
        assert torch.equal(a.P, b.P)
    assert first[2].report() == second[2].report()
