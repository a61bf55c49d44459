"""Covariances with a given spectrum, and their dense float64 inverse roots."""

import torch


def spd(d, condition, *, top=None, seed=0, dtype=torch.float32):
    """Return a random symmetric A (d, d) with this condition number, and its smallest eigenvalue.

    By default the eigenvalues are log-uniform. With `top`, one eigenvalue holds this fraction of
    the trace, as for real activations, and the others cover six decades before damping is added.
    """
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    if top is None:
        w = torch.logspace(0, 1, d, base=1 / condition, dtype=torch.float64)
    else:
        rest = torch.logspace(0, -6, d - 1, dtype=torch.float64)
        sigma = torch.cat([torch.tensor([top]), rest * (1 - top) / rest.sum()])
        least, most = sigma.min(), sigma.max()
        w = sigma + ((most - condition * least) / (condition - 1)).clamp(min=0)
    A = (Q * w) @ Q.mT
    return ((A + A.mT) / 2).to(dtype), w.min().item()


def exact_inverse_root(A, p):
    """Return A^(-1/p) from a float64 eigendecomposition."""
    w, Q = torch.linalg.eigh(A.double())
    return (Q * w[..., None, :] ** (-1 / p)) @ Q.mT


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
