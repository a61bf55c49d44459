from .dopr.preconditioner import ActivationPreconditioner

__all__ = ["ActivationPreconditioner"]
