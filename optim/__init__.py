from optim.dopr import ActivationPreconditioner

__all__ = ["ActivationPreconditioner"]
