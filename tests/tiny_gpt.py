"""A GPT that is small enough for tests, and ids for it."""

import torch

from model import GPT, GPTConfig

TINY = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}


def gpt(seed=0, **changes):
    """Return a tiny model in eval mode.

    Its weights are large enough for logits that differ between tokens.
    """
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**TINY | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "wte" not in name:
                parameter.mul_(5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def tokens(*shape, seed=0):
    """Return random ids of the given shape."""
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))
