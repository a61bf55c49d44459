"""Width rules of the maximal update parametrization (muP).

Let m = width / base width. The tables hold exponents of m: a quantity is multiplied by m**exponent.
At the base width all factors are exactly 1, and muP equals the standard parametrization bit for
bit. No factor is stored on a tensor: factors follow from the settings and from the role of a
parameter (see groups.py). The role "matrix" is a hidden linear layer (d_out, d_in) of which both
sides grow with m.

Sources: Yang et al., Tensor Programs V, arXiv 2203.03466, table 8, with the multiplier 1/m on the
logits; for orthogonalized updates, Yang, Simon, Bernstein, arXiv 2310.17813; for weight decay,
Wang, Aitchison, arXiv 2405.13698 (independent), and Fan et al., arXiv 2510.15262 (sqrt).
"""

import math
from typing import Any, Literal

from torch.optim import Optimizer

WeightDecayScaling = Literal["independent", "constant", "sqrt", "inv_width"]

INIT = -1 / 2  # initial standard deviation of matrices; that of other parameters does not change
LOGITS = -1  # logits; the head's input and its covariance keep their scale

# Updates of matrices, by optimizer.
MATRIX_UPDATE = {
    "adamw": -1,  # entries have size 1, so the product with an input grows with d_in
    "signum": -1,
    "muon unit_rms_norm": 0,  # the update has the spectral norm √(d_out/d_in)
    "muon original": 0,
    "muon match_rms_adamw": -1 / 2,  # spectral norm √d
    "adamuon": -1 / 2,
    "sgd": 0,
    # SGD's rule relies on gradients and inputs that share a few large directions, and DoPr whitens
    # them. With d_eff = Σ λ/(λ + γ̄), a step of DoPr changes activations by d_eff/d times as much as
    # one of SGD. The exponent is 0 if all eigenvalues are equal and 1 if d_eff does not grow with
    # d; 4/5 is measured (docs/mup.md). Trace normalization of P does not change it, because
    # tr(Σ)/d does not grow with d. DoPr needs no rule for the scale-invariant optimizers.
    "dopr sgd": 4 / 5,
}
ADAM_LIKE = "adamw"  # the rule of every elementwise update that ignores the gradient's scale
# Updates of embeddings, head, gains and biases; the exponent of all other optimizers is 0.
OTHER_UPDATE = {"sgd": 1, "dopr sgd": 1}

EPS = {"adamw": -1, "adamuon": -1 / 2}  # eps scales like the entries that it is added to

# Weight decay λ of matrices relative to their learning rate, which is η times the update factor.
# "independent" has no exponent: it keeps η λ constant, so λ scales inversely to that factor.
DECAY = {"constant": 0, "sqrt": 1 / 2, "inv_width": -1}


def forward_mults(m: float, head_m: float) -> dict[str, float]:
    """Return the factors that the model applies, as {field of GPTConfig: factor}.

    `head_m` is the width of an attention head relative to that of the base model. Attention logits
    are qᵀk √d_base / d instead of qᵀk / √d because q and k become correlated during training.
    """
    return {"init_mult": m**INIT, "attention_mult": math.sqrt(1 / head_m), "logits_mult": m**LOGITS}


def update_mult(rule: str, role: str, m: float) -> float:
    """Return the factor on the update of a parameter. `rule` is a key of MATRIX_UPDATE."""
    return m ** (MATRIX_UPDATE[rule] if role == "matrix" else OTHER_UPDATE.get(rule, 0))


def decay_mult(scaling: WeightDecayScaling, rule: str, role: str, m: float) -> float:
    """Return the factor on η λ, the fraction by which a weight decays per step.

    η is the learning rate at the base width, without the update factor.
    """
    if scaling == "independent":
        return 1.0
    return update_mult(rule, role, m) * m ** (DECAY[scaling] if role == "matrix" else 0)


def eps_mult(optimizer: str, m: float) -> float:
    """Return the factor on the eps of an optimizer."""
    return m ** EPS.get(optimizer, 0)


def scale_to_width(
    optimizer: Optimizer, m: float, wd_scaling: WeightDecayScaling, *, rule: str, dopr: bool
) -> None:
    """Scale updates, weight decay and eps from the base width to m times that width, in place.

    The update factor is multiplied into `lr_mult` where a param group has this key. Groups of torch
    optimizers do not: there it is multiplied into `lr` and `base_lr`, and `weight_decay` is divided
    by it, which leaves lr · weight_decay to the decay factor alone. With m = 1 nothing changes.

    Args:
        rule: a key of MATRIX_UPDATE; only "muon" without its `adjust_lr`.
        dopr: whether activation preconditioning runs before this optimizer.
    """
    if m == 1:
        return
    for group in optimizer.param_groups:
        key, role = _key(rule, group, dopr=dopr), group["role"]
        update = update_mult(key, role, m)
        if "weight_decay" in group:
            group["weight_decay"] *= decay_mult(wd_scaling, key, role, m)
        if "lr_mult" in group:
            group["lr_mult"] *= update
        else:
            group["lr"] *= update
            group["base_lr"] *= update
            if "weight_decay" in group:
                group["weight_decay"] /= update
        if isinstance(group.get("eps"), float):
            group["eps"] *= eps_mult(rule, m)


def _key(rule: str, group: dict[str, Any], *, dopr: bool) -> str:
    """Return the key of MATRIX_UPDATE for a param group. Muon has one for each `adjust_lr`."""
    key = f"{rule} {group['adjust_lr']}" if "adjust_lr" in group else rule
    return f"dopr {key}" if dopr and f"dopr {key}" in MATRIX_UPDATE else key
