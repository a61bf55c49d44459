"""Fold the forward multipliers of a muP model into its weights, and unfold them again.

A GPT-2 without multipliers computes the same logits from the folded weights:

    logits_mult      multiplies the last LayerNorm, whose output only the head reads
    attention_mult   multiplies the rows of q and their biases

The logits are equal bit for bit if the multipliers are powers of two, else up to rounding.
"""

from collections.abc import Mapping

from torch import Tensor, cat

from eval.deferred import DeferredTensors
from model import GPT, GPTConfig


def folded_weights(model: GPT) -> dict[str, Tensor]:
    """Return a state_dict on the CPU for a GPT without multipliers that computes the same."""
    weights = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    config = model.config
    return dict(_scaled(weights, config.logits_mult, config.attention_mult))


def unfolded_weights(weights: Mapping[str, Tensor], config: GPTConfig) -> Mapping[str, Tensor]:
    """Convert the weights of a standard GPT for a GPT with the multipliers of `config`."""
    return _scaled(weights, 1 / config.logits_mult, 1 / config.attention_mult)


def _scaled(weights: Mapping[str, Tensor], logits: float, attention: float) -> DeferredTensors:
    """Multiply ln_f by `logits` and the q parts by `attention`."""

    def scaled(key: str, tensor: Tensor) -> Tensor:
        if ".ln_f." in key and logits != 1:
            return tensor * logits
        if ".c_attn." in key and attention != 1:
            q, k_and_v = tensor.tensor_split([len(tensor) // 3])  # (3 C, C) or (3 C,)
            return cat([q * attention, k_and_v])
        return tensor

    return DeferredTensors(weights, scaled)
