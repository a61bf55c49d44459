"""Covariances to invert in tests, and the dense float64 answer."""

import torch


def spd(d, condition, *, top=None, seed=0, dtype=torch.float32):
    """A random symmetric A (d, d) with this condition number; returns A and its least eigenvalue.

    Its eigenvalues are log-uniform, or, as with real activations, one of them holds the share
    `top` of the trace and the rest spread over six decades, with a damping.
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
    """A^(-1/p) by a float64 eigendecomposition."""
    w, Q = torch.linalg.eigh(A.double())
    return (Q * w[..., None, :] ** (-1 / p)) @ Q.mT


def relative_error(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
