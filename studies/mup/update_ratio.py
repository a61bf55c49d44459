"""Measure how far the last step of a run moved the weights, relative to their norms."""

import math
import re
from pathlib import Path

import torch

from trainer.checkpoint.read import candidates, load_checkpoint

HIDDEN = re.compile(r"\.h\.\d+\..*\.c_\w+\.weight$")


def measure_update(folder: Path) -> dict[str, float | None]:
    """Return {"update_ratio": ‖W' - W‖ / ‖W‖} of the last step.

    The value is the geometric mean over hidden matrices. It is None if train.py skipped the last
    step or the one before, because the gradients were not finite.

    With weight decay λ and updates of constant size, such as AdamW's, it settles at about √(2 η λ)
    after some 3 / (η λ) steps (Kosson et al., Rotational Equilibrium, arXiv 2305.17212).
    """
    after, before = map(load_checkpoint, candidates(folder / "checkpoints")[:2])
    is_apart = after.step - before.step != 1
    if after.train["skipped_in_row"] or (is_apart and after.train["skipped"]):
        return {"update_ratio": None}
    if is_apart:
        raise ValueError(f"{folder}: expected the checkpoints of the last two steps")
    norm = torch.linalg.vector_norm
    logs = [
        math.log(norm(W - before.model[key]) / norm(before.model[key]))
        for key, W in after.model.items()
        if HIDDEN.search(key)
    ]
    return {"update_ratio": math.exp(sum(logs) / len(logs))}
