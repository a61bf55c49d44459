"""Activation preconditioning (DoPr) for any optimizer, and the Muon, AdaMuon, Signum optimizers."""

from .adamuon import AdaMuon
from .dopr.preconditioner import ActivationPreconditioner
from .muon import Muon
from .signum import Signum

__all__ = ["ActivationPreconditioner", "AdaMuon", "Muon", "Signum"]
__version__ = "0.2.0"
