"""Measure the size of a model's activations and how far training moves them (coordinate check).

Source: Yang et al., Tensor Programs V, arXiv 2203.03466, appendix D.1.
"""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loader import val_batches
from eval.rollout.tasks import open_data
from eval.run import run_of
from model import GPT
from studies.sweep.run_cache import read_settings
from trainer.checkpoint.read import load_checkpoint, open_checkpoint

STEPS = (0, 1, 2, 4, 8)  # activations are measured after these steps
KINDS = {  # kind of activation: pattern of the modules whose outputs it is
    "embedding": r"transformer\.drop",
    "qkv": r"transformer\.h\.\d+\.attn\.c_attn",
    "attention out": r"transformer\.h\.\d+\.attn\.c_proj",
    "fc": r"transformer\.h\.\d+\.mlp\.c_fc",
    "mlp out": r"transformer\.h\.\d+\.mlp\.c_proj",
    "residual": r"transformer\.h\.\d+",
}
PROBES = 16  # sequences of the validation data


def measure_coordinates(folder: Path) -> dict[str, dict[str, Any]]:
    """Measure the activations of a run on a fixed batch, from its checkpoints.

        coordinates  {kind: {t: RMS of the activations (t = 0) or of their change since t = 0}}
        ap           {layer: ‖M‖ / ‖G‖ of activation preconditioning in the first step}

    Both are geometric means over the layers or matrices of a kind. The result is empty if a
    checkpoint of STEPS is missing, because train.py skipped a step with gradients that were not
    finite.
    """
    paths = {t: folder / f"checkpoints/step-{t:08d}" for t in STEPS}
    if not all(path.exists() for path in paths.values()):
        return {}
    settings = read_settings(folder)
    block_size = settings["block_size"]
    data = open_data(settings["dataset"])
    x, _ = next(iter(val_batches(data, batch_size=PROBES, block_size=block_size)))
    found = {t: activations(run_of(open_checkpoint(path)).model, x) for t, path in paths.items()}
    changes = {t: {k: _change(found[t][k], found[0][k], t) for k in found[0]} for t in STEPS}
    return {
        "coordinates": {kind: {str(t): changes[t][kind] for t in STEPS} for kind in found[0]},
        "ap": _norm_ratios(paths[1]),
    }


def _change(now: list[Tensor], first: list[Tensor], t: int) -> float:
    """Return the geometric mean over layers of the RMS of activations, or of their change if t."""
    pairs = zip(now, first, strict=True)
    sizes = [(a - b if t else a).square().mean().sqrt() for a, b in pairs]
    return torch.stack(sizes).log().mean().exp().item()


@torch.no_grad()
def activations(model: GPT, x: Tensor) -> dict[str, list[Tensor]]:
    """Return the outputs of all modules of each of KINDS, in order, and the logits.

    x: tokens (B, T).
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, output, kind=kind: found[kind].append(output.float())
        )
        for name, module in model.named_modules()
        for kind, pattern in KINDS.items()
        if re.fullmatch(pattern, name)
    ]
    logits, _ = model.eval()(x)
    for hook in hooks:
        hook.remove()
    return {**found, "logits": [logits.float()]}


def _norm_ratios(path: Path) -> dict[str, float]:
    """Return ‖M‖ / ‖G‖ in the step before a checkpoint by kind of matrix; empty without DoPr."""
    layers = load_checkpoint(path).train["dopr"] or {}
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, state in layers.items():
        kinds[".".join(name.split(".")[-2:])].append(math.log(float(state["norm_ratio"])))
    return {kind: math.exp(sum(logs) / len(logs)) for kind, logs in kinds.items()}
