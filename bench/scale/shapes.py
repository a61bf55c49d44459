"""Define the models of the cost model as GPTs on the meta device, with DoPr's layers attached.

Shapes, bytes, owners and messages come from the classes that train, so they follow the code.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model import GPT, GPTConfig
from optim import ActivationPreconditioner
from optim.dopr.layer import Layer
from optim.groups import assign_roles
from trainer.sharding import transformer_blocks


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a GPT and of its batch."""

    name: str
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_tokens: int  # per optimizer step, over all GPUs
    micro_tokens: int  # per forward on one GPU, at most
    vocab_size: int = 50304


# Widths and depths: Radford et al. 2019 (124M, 1.5B); Brown et al. 2020, table 2.1 (6.7B, 13B);
# Hoffmann et al. 2022 (80 x 8192 of Chinchilla 70B, which is 65B with GPT-2's blocks). Batches:
# config/gpt2_dopr.py; Brown et al. (1M, 2M, 2M); Touvron et al. 2023 (4M). micro_tokens: assumed.
SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("124M", 12, 12, 768, 1024, 2**19, 32768),
        ModelShape("1.5B", 48, 25, 1600, 1024, 2**20, 8192),
        ModelShape("6.7B", 32, 32, 4096, 2048, 2**21, 4096),
        ModelShape("13B", 40, 40, 5120, 2048, 2**21, 4096),
        ModelShape("65B", 80, 64, 8192, 2048, 2**22, 2048),
    )
}


class DoprMode(NamedTuple):
    """Settings of DoPr."""

    name: str
    refresh_every: int = 1
    collect_every: int = 1
    token_stride: int = 1
    blocks_of_width: bool = False  # whether Σ has blocks as wide as the model, or is dense
    fresh_mean: bool = False  # whether every step uses the mean of its own inputs
    inverse: str = "cholesky"
    gamma: float = 0.1

    def settings(self, width: int) -> dict[str, Any]:
        """Return the keyword arguments of ActivationPreconditioner."""
        keys = ("refresh_every", "collect_every", "token_stride", "fresh_mean", "inverse", "gamma")
        return {key: getattr(self, key) for key in keys} | {
            "block_diagonal": width if self.blocks_of_width else None,
            "sigma_beta": 0.95 if self.refresh_every > 1 else None,
        }


EXACT = DoprMode("exact")
SAMPLED = DoprMode("sampled", 10, 10, 8, blocks_of_width=True)
FRESH_MEAN = SAMPLED._replace(name="fresh mean", fresh_mean=True)  # config/gpt2_dopr.py
MODES = (EXACT, SAMPLED, FRESH_MEAN)


def meta_gpt(shape: ModelShape) -> GPT:
    """Build the model on the meta device."""
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    with torch.device("meta"):
        return GPT(GPTConfig(bias=False, **{key: getattr(shape, key) for key in sizes}))


gpt = lru_cache(meta_gpt)


@lru_cache
def layers(shape: ModelShape, mode: DoprMode) -> list[Layer]:
    """Return the layers that DoPr covers, with Σ, P, U and μ on the meta device.

    They belong to a model of their own, so that `gpt(shape)` has no hooks.
    """
    model = meta_gpt(shape)
    return ActivationPreconditioner(model, **mode.settings(shape.n_embd)).layers


@lru_cache
def matrices(shape: ModelShape) -> list[tuple[list[tuple[int, ...]], int]]:
    """Return, for each of Muon's param groups, its matrix shapes and its number of qkv blocks."""
    groups: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for row in assign_roles(gpt(shape)):
        if row.role == "matrix":
            groups[row.qkv_blocks].append(tuple(row.param.shape))
    return [(shapes, qkv_blocks) for qkv_blocks, shapes in groups.items()]


@lru_cache
def units(shape: ModelShape) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return what FSDP2 gathers together: the weights of each transformer block, and the others."""
    model = gpt(shape)
    blocks: list[list[Tensor]] = [list(block.parameters()) for block in transformer_blocks(model)]
    in_blocks = {param for block in blocks for param in block}
    return blocks, [param for param in model.parameters() if param not in in_blocks]


@lru_cache
def n_weights(shape: ModelShape) -> int:
    return gpt(shape).n_parameters()
