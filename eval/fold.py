"""The standard GPT-2 that computes what a muP model computes: its factors are in the weights."""

from torch import Tensor

from model import GPT


def folded_weights(model: GPT) -> dict[str, Tensor]:
    """The model's state_dict (on the CPU) for a GPT without factors: the same logits.

        logits_mult      into the last LayerNorm, whose output only the head sees
        attention_mult   into the rows of q, and their biases

    Equal bit for bit where the factors are powers of two, up to rounding elsewhere.
    """
    weights = {key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    C, config = model.config.n_embd, model.config
    for key, tensor in weights.items():
        if ".ln_f." in key and config.logits_mult != 1:
            weights[key] = tensor * config.logits_mult
        if ".c_attn." in key and config.attention_mult != 1:
            weights[key] = tensor.clone()  # (3 C, C) or (3 C,): q, k, v one below the other
            weights[key][:C] *= config.attention_mult
    return weights
