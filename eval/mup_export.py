"""A muP model's factors moved into its weights, or out of them: the logits of a standard GPT-2.

    logits_mult      the last LayerNorm, whose output only the head sees
    attention_mult   the rows of q, and their biases

Equal bit for bit where the factors are powers of two, up to rounding elsewhere.
"""

from collections.abc import Mapping

from torch import Tensor, cat

from model import GPT, GPTConfig


def folded_weights(model: GPT) -> dict[str, Tensor]:
    """The model's state_dict (on the CPU) for a GPT without factors."""
    weights = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    return _scaled(weights, model.config.logits_mult, model.config.attention_mult)


def unfolded_weights(weights: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The state_dict of a GPT without factors for one that has those of `config`."""
    return _scaled(weights, 1 / config.logits_mult, 1 / config.attention_mult)


def _scaled(weights: Mapping[str, Tensor], logits: float, attention: float) -> dict[str, Tensor]:
    """A copy in which what makes the logits, and what makes those of attention, is multiplied."""
    found = dict(weights)
    for key, tensor in weights.items():
        if ".ln_f." in key and logits != 1:
            found[key] = tensor * logits
        if ".c_attn." in key and attention != 1:
            q, k_and_v = tensor.tensor_split([len(tensor) // 3])  # (3 C, C) or (3 C,)
            found[key] = cat([q * attention, k_and_v])
    return found
