"""The knob `kernel` of the optimizers and of a run, on a host without a GPU."""

import copy
import os
import pickle

import pytest
import torch

import train
from optim import ActivationPreconditioner
from optim.adamuon import AdaMuon
from optim.build import build_optimizers
from optim.dopr.layer import precondition
from optim.muon import Muon
from tests.optim.models import backward, mlp
from tests.optim.runs import assert_same, made, matrices
from tests.optim.runs import train as train_parts
from tests.tiny import argv
from trainer.config import load_config
from trainer.settings import ConfigError

NEITHER = "backend='triton' needs CUDA or TRITON_INTERPRET=1; this host has neither"
needs_a_plain_host = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton can run here",
)
MATRIX = [Muon, AdaMuon]


@pytest.mark.parametrize("settings", [{}, {"inverse": "newton_schulz", "refresh_every": 2}])
def test_auto_on_a_cpu_is_torch_bit_for_bit(settings):
    parts = [made("adamw", backend=backend, **settings) for backend in ("auto", "torch")]
    for each in parts:
        train_parts(each, range(3))
    assert_same(*parts)


@pytest.mark.parametrize("settings", [{}, {"block_diagonal": 6}])
def test_torch_multiplies_each_gradient_by_its_own_p_as_ever(settings):
    model, _, preconditioner = parts = made("sgd", backend="torch", **settings)
    train_parts(parts, range(2))
    backward(model)
    grads = [layer.covered.weight.grad.clone() for layer in preconditioner.layers]
    parts[1].step()
    for layer, G in zip(preconditioner.layers, grads, strict=True):
        assert torch.equal(layer.covered.weight.grad, precondition(G, layer.P))


@pytest.mark.parametrize("kind", MATRIX)
def test_auto_orthogonalises_by_torch_on_a_cpu(kind):
    models = [mlp(), mlp()]
    for model, backend in zip(models, ("auto", "torch"), strict=True):
        optimizer = kind([matrices(model)], lr=0.1, backend=backend)
        train_parts((model, optimizer, None), range(3))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@needs_a_plain_host
def test_triton_on_a_plain_cpu_is_refused_at_construction():
    model = mlp()
    with pytest.raises(ValueError, match=NEITHER):
        ActivationPreconditioner(model, gamma=0.1, backend="triton")
    assert "forward" not in vars(model[0])
    for kind in MATRIX:
        with pytest.raises(ValueError, match=NEITHER):
            kind([matrices(model)], backend="triton")


@pytest.mark.parametrize("kind", MATRIX)
def test_an_unknown_kernel_is_refused(kind):
    with pytest.raises(ValueError, match="backend='cuda': must be one of auto, torch, triton"):
        kind([matrices(mlp())], backend="cuda")


@pytest.mark.parametrize("kind", MATRIX)
def test_the_kernel_is_of_the_machine_and_not_of_the_state(kind):
    optimizer = kind([matrices(mlp())], backend="torch")
    assert "backend" not in str(optimizer.state_dict())
    assert copy.deepcopy(optimizer).backend == "torch"
    assert pickle.loads(pickle.dumps(optimizer)).backend == "torch"


def test_a_run_hands_its_kernel_to_all_that_have_one(dataset, tmp_path, capsys):
    arguments = argv(dataset, tmp_path, dopr="true", optimizer="muon", backend="torch")
    config, _ = load_config(arguments)
    model = mlp()
    numbers = train.optimizer_settings(config)
    assert build_optimizers(model, **numbers)[0].backend == "torch"
    assert train.build_preconditioner(config, model).settings.backend == "torch"
    assert train.main([*arguments, "--max_steps=3", "--backend=auto"]) == 0
    assert "kernels: torch (auto: the tensors are on cpu)" in capsys.readouterr().out


@needs_a_plain_host
def test_a_run_that_asks_for_triton_on_a_plain_cpu_is_refused_before_anything_is_done():
    with pytest.raises(ConfigError, match=NEITHER):
        load_config(["--backend=triton"], train.machine_problems)
    with pytest.raises(ConfigError, match="backend='cuda': must be one of auto, torch, triton"):
        load_config(["--backend=cuda"], train.machine_problems)
