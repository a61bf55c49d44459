"""Small models, fixed data and the dense fp64 oracle, shared by the tests of DoPr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw normal numbers in fp64 from a seed, and round them to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def ill_conditioned(n: int, d: int, *, condition: float, seed: int) -> Tensor:
    """Return inputs (n, d) in fp64, n >= d, with eigenvalues of Σ from 1 down to 1/condition."""
    Q = torch.linalg.qr(randn(n, d, seed=seed, dtype=torch.float64))[0]
    V = torch.linalg.qr(randn(d, d, seed=seed + 1, dtype=torch.float64))[0]
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), d, dtype=torch.float64)
    return n**0.5 * (Q * values.sqrt()) @ V.mT


def mlp(d_in: int = 12, d: int = 9, d_out: int = 5, *, seed: int = 0) -> nn.Sequential:
    """Return a model of two linear layers named 0 and 2, in fp32."""
    model = nn.Sequential(nn.Linear(d_in, d), nn.Tanh(), nn.Linear(d, d_out))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.4 * randn(*parameter.shape, seed=100 * seed + i))
    return model


def regression(step: int = 0, n: int = 64, dtype: torch.dtype = torch.float32):
    """Return inputs (n, 12) of very different scales and targets (n, 5) that an mlp() can learn."""
    x = randn(n, 12, seed=1000 + step, dtype=dtype) * torch.logspace(0.5, -1, 12, dtype=dtype)
    return x, torch.tanh(x @ randn(12, 5, seed=7, dtype=dtype))


def backward(model: nn.Module, step: int = 0, n: int = 64, scale: float = 1.0) -> float:
    """Run a backward of the mean squared error on one batch of `regression`; return the loss."""
    dtype = next(model.parameters()).dtype
    x, target = regression(step, n, dtype)
    loss = (model(x) - target).square().mean() * scale
    loss.backward()
    return loss.item()


@contextmanager
def recorded(*modules: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Record the inputs of these modules inside the context: one list of inputs per module."""
    calls: list[list[Tensor]] = [[] for _ in modules]

    def recorder(inputs: list[Tensor]) -> Callable[..., None]:
        return lambda module, args: inputs.append(args[0].detach().clone())

    hooks = [
        module.register_forward_pre_hook(recorder(inputs))
        for module, inputs in zip(modules, calls, strict=True)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def covariance(*inputs: Tensor) -> Tensor:
    """Return Σ in fp64 over all rows of all inputs (..., d)."""
    z = torch.cat([each.double().reshape(-1, each.shape[-1]) for each in inputs])
    return z.mT @ z / len(z)


def oracle(
    G: Tensor, sigma: Tensor, gamma: float, *, p: int = 1, trace_normalized: bool = True
) -> Tensor:
    """Compute M = (tr Σ/d)^(1/p) G (Σ + γ tr(Σ)/d I)^(-1/p) by definition, dense in fp64."""
    sigma, eye = sigma.double(), torch.eye(len(sigma), dtype=torch.float64)
    mean = sigma.trace() / len(sigma)
    A = sigma + gamma * mean * eye
    if p == 1:
        M = torch.linalg.solve(A, G.double().mT).mT
    else:
        w, Q = torch.linalg.eigh(A)
        M = G.double() @ (Q * w ** (-1 / p)) @ Q.mT
    return M * mean ** (1 / p) if trace_normalized else M


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual - expected‖ / ‖expected‖, in fp64."""
    difference = actual.double() - expected.double()
    return (difference.norm() / expected.double().norm()).item()
