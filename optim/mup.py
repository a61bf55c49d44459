"""Width rules of the maximal update parametrisation (muP), as data.

m = width / base width. An entry is an exponent of m: what it stands beside is multiplied by m to
that power. At the base width all factors are exactly 1, and muP is the standard parametrisation
(SP) bit for bit. Nothing is stored on tensors: factors follow from the settings and from what a
parameter is (its role, optim/groups.py).

Sources: Yang et al., Tensor Programs V, arXiv 2203.03466, table 8, with the multiplier 1/m on the
logits; for orthogonalised updates, Yang, Simon, Bernstein, arXiv 2310.17813; weight decay:
Wang, Aitchison, arXiv 2405.13698 (independent), Fan et al., arXiv 2510.15262 (sqrt).
"""

import math
from typing import Any, Literal

from torch.optim import Optimizer

WeightDecayScaling = Literal["independent", "constant", "sqrt", "inv_width"]

INIT = -1 / 2  # standard deviation of a matrix; embeddings, head, gains and biases keep theirs
LOGITS = -1  # a factor on the logits, so that the head's input and its covariance keep their size

# Updates. Role matrix is a hidden linear layer, (d_out, d_in), both of which grow with m.
MATRIX = {
    "adamw": -1,  # every entry of the update has size 1: its product with an input grows with d_in
    "signum": -1,
    "muon spectral": 0,  # the update has the spectral norm √(d_out/d_in)
    "muon original": 0,
    "muon match_rms_adamw": -1 / 2,  # spectral norm √d
    "adamuon": -1 / 2,
    "sgd": 0,
    # DoPr whitens what SGD relies on, that gradients and inputs share a few large directions. With
    # d_eff = Σ λ/(λ + γ̄) its step moves activations by d_eff/d of SGD's: between 0 (all directions
    # alike) and 1 (a fixed number of them) for the spectra of a model; measured, LOG.md. Whether P
    # is trace-normalised does not matter, as tr(Σ)/d does not grow. The others are scale-invariant.
    "dopr sgd": 4 / 5,
}
REST = {"sgd": 1, "dopr sgd": 1}  # embeddings, head, gains, biases; with all others 0

EPS = {"adamw": -1, "adamuon": -1 / 2}  # as the entries that it is added to

# λ of a matrix beside its own rate, η times its factor of MATRIX. Independent: η λ is the same at
# every width, which is the inverse of that factor.
DECAY = {"constant": 0, "sqrt": 1 / 2, "inv_width": -1}


def forward_mults(m: float, head_m: float) -> dict[str, float]:
    """The factors that the model applies, by the name of their field of GPTConfig.

    head_m: width of a head, relative to the base's. Attention logits are qᵀk √d_base / d instead of
    qᵀk / √d, because q and k become correlated.
    """
    return {"init_mult": m**INIT, "attention_mult": math.sqrt(1 / head_m), "logits_mult": m**LOGITS}


def update_mult(rule: str, role: str, m: float) -> float:
    """The factor on the update of a parameter. rule: a key of MATRIX."""
    return m ** (MATRIX[rule] if role == "matrix" else REST.get(rule, 0))


def decay_mult(scaling: WeightDecayScaling, rule: str, role: str, m: float) -> float:
    """The factor on η λ, the share of a weight that decays in a step; η has no factor itself."""
    if scaling == "independent":
        return 1.0
    return update_mult(rule, role, m) * m ** (DECAY[scaling] if role == "matrix" else 0)


def eps_mult(optimizer: str, m: float) -> float:
    """The factor on the eps of an optimizer."""
    return m ** EPS.get(optimizer, 0)


def follow_width(
    optimizer: Optimizer, m: float, wd_scaling: WeightDecayScaling, *, dopr: bool
) -> None:
    """Scale updates, decay and eps, in place, to a model of m times the width they are tuned at.

    The factor on updates is `lr_mult` where the optimizer knows it. torch's do not: it goes into
    `lr` and `base_lr`, and `weight_decay` is divided by it, so that lr · weight_decay is as asked.
    With m = 1 nothing changes. dopr: activation preconditioning is in front of it.
    """
    name = type(optimizer).__name__.lower()
    for group in optimizer.param_groups:
        rule, role = rule_of(name, group, dopr=dopr), group["role"]
        update = update_mult(rule, role, m)
        group["weight_decay"] *= decay_mult(wd_scaling, rule, role, m)
        if "lr_mult" in group:
            group["lr_mult"] *= update
        else:
            group["lr"] *= update
            group["base_lr"] *= update
            group["weight_decay"] /= update
        if "eps" in group:
            group["eps"] *= eps_mult(name, m)


def rule_of(name: str, group: dict[str, Any], *, dopr: bool) -> str:
    """The row of mup.MATRIX that a param group follows; Muon has one for each of its scales."""
    name = f"{name} {group['adjust_lr']}" if "adjust_lr" in group else name
    return f"dopr {name}" if dopr and f"dopr {name}" in MATRIX else name
