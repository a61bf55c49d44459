"""The models of the table, as GPTs without memory (meta tensors), with DoPr's layers attached.

Shapes, bytes, owners and messages are asked of the objects that train, so they follow the code.
"""

from __future__ import annotations

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
class Shape:
    """A GPT and its batch."""

    name: str
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_tokens: int  # of an optimizer step, over all GPUs
    micro_tokens: int  # of a forward on one GPU, at most
    vocab_size: int = 50304


# Widths and depths: Radford et al. 2019 (124M, 1.5B); Brown et al. 2020, table 2.1 (6.7B, 13B);
# Hoffmann et al. 2022 (Chinchilla 70B's 80 x 8192, which with GPT-2's blocks is 65B). Batches:
# config/gpt2_dopr.py; Brown et al. (1M, 2M, 2M); Touvron et al. 2023 (4M). micro_tokens: assumed.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("124M", 12, 12, 768, 1024, 2**19, 32768),
        Shape("1.5B", 48, 25, 1600, 1024, 2**20, 8192),
        Shape("6.7B", 32, 32, 4096, 2048, 2**21, 4096),
        Shape("13B", 40, 40, 5120, 2048, 2**21, 4096),
        Shape("65B", 80, 64, 8192, 2048, 2**22, 2048),
    )
}


class Mode(NamedTuple):
    """Settings of DoPr; `blocks_of_width`: Σ in blocks as wide as the model, else dense."""

    name: str
    refresh_every: int = 1
    collect_every: int = 1
    token_stride: int = 1
    blocks_of_width: bool = False
    inverse: str = "cholesky"
    gamma: float = 0.1

    def settings(self, width: int) -> dict[str, Any]:
        """The keywords of ActivationPreconditioner."""
        keys = ("refresh_every", "collect_every", "token_stride", "inverse", "gamma")
        return {key: getattr(self, key) for key in keys} | {
            "block_diagonal": width if self.blocks_of_width else None,
            "sigma_beta": 0.95 if self.refresh_every > 1 else None,
        }


EXACT = Mode("exact")
FAST = Mode("fast", 10, 10, 8, blocks_of_width=True)  # config/gpt2_dopr.py


def without_numbers(shape: Shape) -> GPT:
    """The model on the meta device."""
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    with torch.device("meta"):
        return GPT(GPTConfig(bias=False, **{key: getattr(shape, key) for key in sizes}))


gpt = lru_cache(without_numbers)


@lru_cache
def layers(shape: Shape, mode: Mode) -> list[Layer]:
    """What DoPr covers, and the shapes of its Σ, P and U; of a model of its own."""
    model = without_numbers(shape)
    return ActivationPreconditioner(model, **mode.settings(shape.n_embd)).layers


@lru_cache
def matrices(shape: Shape) -> list[tuple[list[tuple[int, ...]], int]]:
    """Of each of Muon's param groups, the shapes of its matrices and their number of row blocks."""
    groups: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for row in assign_roles(gpt(shape)):
        if row.role == "matrix":
            groups[row.qkv_blocks].append(tuple(row.param.shape))
    return [(shapes, qkv_blocks) for qkv_blocks, shapes in groups.items()]


@lru_cache
def units(shape: Shape) -> tuple[list[list[Tensor]], list[Tensor]]:
    """What FSDP2 gathers together: the parameters of each block, and all others."""
    model = gpt(shape)
    repeated: list[list[Tensor]] = [list(block.parameters()) for block in transformer_blocks(model)]
    held = {param for block in repeated for param in block}
    return repeated, [param for param in model.parameters() if param not in held]


def n_weights(shape: Shape) -> int:
    return gpt(shape).n_parameters()
