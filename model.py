"""The GPT-2 model and its loss. `eval/generate.py` repeats its forward with a key-value cache."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -1  # the target of a position that the loss does not score
TILE = 64  # tensor cores are fastest when a matrix has a multiple of this many rows


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT-2. Raises ValueError that lists every field out of range."""

    vocab_size: int
    block_size: int  # context length in tokens
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms
    tie_weights: bool = True  # the output head is the token embedding; there is no lm_head
    init_mult: float = 1.0  # multiplies the initial std of hidden matrices; see optim/mup.py
    attention_mult: float = 1.0  # multiplies the attention logits
    logits_mult: float = 1.0  # multiplies the output logits

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        given = ((key, getattr(self, key)) for key in sizes)
        claims = {  # the message if it is false: what must be true
            f"{key}={size}: must be at least 1": size >= 1 for key, size in given
        }
        divides = self.n_head < 1 or self.n_embd % self.n_head == 0
        claims[f"n_embd={self.n_embd}: must be divisible by n_head={self.n_head}"] = divides
        claims[f"dropout={self.dropout}: must be in [0, 1)"] = 0 <= self.dropout < 1
        for key in ("init_mult", "attention_mult", "logits_mult"):
            claims[f"{key}={getattr(self, key)}: must be positive"] = getattr(self, key) > 0
        require(claims)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.scale = config.attention_mult / math.sqrt(config.n_embd // config.n_head)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, T, D) each
        p = self.resid_dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, scale=self.scale)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): a pre-norm transformer decoder with learned positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        parts = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
        }
        self.transformer = nn.ModuleDict(parts)
        if not config.tie_weights:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            self.draw_(name, parameter)

    @torch.no_grad()
    def draw_(self, name: str, parameter: Tensor) -> None:
        """Draw a parameter as GPT-2 does: N(0, 0.02²), biases 0, LayerNorm gains 1.

        Projections back to the residual stream have std 0.02 / sqrt(2 n_layer). `init_mult`
        multiplies both standard deviations in the matrices of the transformer blocks.
        """
        std = 0.02 * self.config.init_mult
        if name.endswith("c_proj.weight"):
            parameter.normal_(std=std / math.sqrt(2 * self.config.n_layer))
        elif parameter.dim() == 2:
            parameter.normal_(std=std if ".h." in name else 0.02)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)

    def forward(
        self,
        idx: Tensor,  # (B, T) token ids
        targets: Tensor | None = None,  # (B, T) token ids, or IGNORE
        *,
        reduction: Literal["mean", "sum"] = "mean",
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the logits (B, T, V) and the cross-entropy of the scored targets in nats.

        Args:
            reduction: average or sum the cross-entropy over the scored targets.
            return_logits: False returns None for the logits if there are targets, to free memory.
        Raises:
            ValueError: T is larger than block_size.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"got {T} tokens a row, but block_size is {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T, device=idx.device))
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)  # (B, T, C)
        logits, loss = self.logits(self.transformer.ln_f(x)), None
        if targets is not None:
            rows, labels = logits.flatten(0, 1), targets.flatten()
            loss = F.cross_entropy(rows, labels, ignore_index=IGNORE, reduction=reduction)
        keeps_logits = return_logits or loss is None
        return logits if keeps_logits else None, loss

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head, (..., C) -> (..., V)."""
        tied = self.config.tie_weights
        logits = tied_head(hidden, self.transformer.wte.weight) if tied else self.lm_head(hidden)
        return logits if self.config.logits_mult == 1 else logits * self.config.logits_mult

    def n_parameters(self) -> int:
        """Return the number of weights; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Return the FLOPs of forward and backward per token, 6 N + 12 L C T (PaLM, appendix B).

        N counts the weights that multiply activations, so not embeddings that are only looked up.
        12 L C T is attention over T = block_size tokens; causality is not deducted.
        """
        config, N = self.config, self.n_parameters() - self.transformer.wpe.weight.numel()
        N -= 0 if config.tie_weights else self.transformer.wte.weight.numel()
        return 6 * N + 12 * config.n_layer * config.n_embd * config.block_size


def tied_head(hidden: Tensor, W: Tensor) -> Tensor:  # (..., C), (V, C) -> (..., V)
    """Return hidden Wᵀ. A batch of 1,024 tokens or more on a GPU uses `aligned_linear`."""
    if W.is_cuda and len(W) % TILE and hidden.numel() >= 1024 * W.size(1):
        return aligned_linear(hidden, W)
    return F.linear(hidden, W)


def aligned_linear(x: Tensor, W: Tensor) -> Tensor:  # (..., C), (V, C) -> (..., V)
    """F.linear with W padded by zero rows to a multiple of TILE; the extra outputs are cut off."""
    return F.linear(x, F.pad(W, (0, 0, 0, -len(W) % TILE)))[..., : len(W)]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and restore each module's own mode on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def require(claims: dict[str, bool]) -> None:
    """Raise one ValueError with all the messages whose claim is false."""
    if problems := [message for message, holds in claims.items() if not holds]:
        raise ValueError("\n".join(problems))
