"""The setting `backend` of the optimizers and of a run, on a host without a GPU."""

import copy
import os
import pickle

import pytest
import torch

import train
from optim import ActivationPreconditioner
from optim.adamuon import AdaMuon
from optim.dopr.statistics import apply_P
from optim.muon import Muon
from tests.optim.models import backward, mlp
from tests.optim.runs import assert_same, made, matrices
from tests.optim.runs import train as train_parts
from tests.tiny import argv
from trainer.build import make_optimizers, make_preconditioner
from trainer.config import load_config
from trainer.machine import machine_problems
from trainer.settings import ConfigError

NEITHER = "backend='triton' needs CUDA or TRITON_INTERPRET=1; this host has neither"
needs_no_gpu = pytest.mark.skipif(
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
def test_torch_multiplies_each_gradient_by_its_own_p(settings):
    model, _, preconditioner = parts = made("sgd", backend="torch", **settings)
    train_parts(parts, range(2))
    backward(model)
    grads = [layer.covered.weight.grad.clone() for layer in preconditioner.layers]
    parts[1].step()
    for layer, G in zip(preconditioner.layers, grads, strict=True):
        assert torch.equal(layer.covered.weight.grad, apply_P(G, layer.P))


@pytest.mark.parametrize("kind", MATRIX)
def test_auto_orthogonalizes_by_torch_on_a_cpu(kind):
    models = [mlp(), mlp()]
    for model, backend in zip(models, ("auto", "torch"), strict=True):
        optimizer = kind([matrices(model)], lr=0.1, backend=backend)
        train_parts((model, optimizer, None), range(3))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@needs_no_gpu
def test_triton_without_a_gpu_is_refused_at_construction():
    model = mlp()
    with pytest.raises(ValueError, match=NEITHER):
        ActivationPreconditioner(model, gamma=0.1, backend="triton")
    assert "forward" not in vars(model[0])
    for kind in MATRIX:
        with pytest.raises(ValueError, match=NEITHER):
            kind([matrices(model)], backend="triton")


@pytest.mark.parametrize("kind", MATRIX)
def test_an_unknown_backend_is_refused(kind):
    with pytest.raises(ValueError, match="backend='cuda': must be one of auto, torch, triton"):
        kind([matrices(mlp())], backend="cuda")


@pytest.mark.parametrize("kind", MATRIX)
def test_the_backend_is_not_in_the_state_dict_but_in_copies(kind):
    optimizer = kind([matrices(mlp())], backend="torch")
    assert "backend" not in str(optimizer.state_dict())
    assert copy.deepcopy(optimizer).backend == "torch"
    assert pickle.loads(pickle.dumps(optimizer)).backend == "torch"


def test_a_run_passes_its_backend_to_the_optimizer_and_the_preconditioner(
    dataset, tmp_path, capsys
):
    arguments = argv(dataset, tmp_path, dopr="true", optimizer="muon", backend="torch")
    config, _ = load_config(arguments)
    model = mlp()
    assert make_optimizers(config, model, None)[0].backend == "torch"
    assert make_preconditioner(config, model).settings.backend == "torch"
    assert train.main([*arguments, "--max_steps=3", "--backend=auto"]) == 0
    assert "backend: torch (auto: the tensors are on cpu)" in capsys.readouterr().out


@needs_no_gpu
def test_a_run_with_triton_but_without_a_gpu_is_refused_at_the_start():
    with pytest.raises(ConfigError, match=NEITHER):
        load_config(["--backend=triton"], machine_problems)
    with pytest.raises(ConfigError, match="backend='cuda': must be one of auto, torch, triton"):
        load_config(["--backend=cuda"], machine_problems)
