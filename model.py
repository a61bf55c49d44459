"""GPT-2 in one file: the model, its key-value cache, and sampling from it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -1  # a target that is not scored
TILE = 64  # rows of a matrix: a multiple of it is aligned, and fills the tiles of tensor cores


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    vocab_size: int
    block_size: int  # tokens of context
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms
    tie_weights: bool = True  # output head = token embedding
    init_mult: float = 1.0  # on the standard deviation of hidden matrices; see mup.py
    attention_mult: float = 1.0  # on the attention logits
    logits_mult: float = 1.0  # on the logits

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        given = ((key, getattr(self, key)) for key in sizes)
        claims = {f"{key}={size}: must be at least 1": size >= 1 for key, size in given}
        divides = self.n_head < 1 or self.n_embd % self.n_head == 0
        claims[f"n_embd={self.n_embd}: must be divisible by n_head={self.n_head}"] = divides
        claims[f"dropout={self.dropout}: must be in [0, 1)"] = 0 <= self.dropout < 1
        for key in ("init_mult", "attention_mult", "logits_mult"):
            claims[f"{key}={getattr(self, key)}: must be positive"] = getattr(self, key) > 0
        _require(claims)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; the defaults are the model's own distribution."""

    temperature: float = 1.0
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # of these, only the fewest likeliest that hold this mass (nucleus)
    greedy: bool = False  # the likeliest token, whatever the rest says

    def __post_init__(self) -> None:
        t, k, p = self.temperature, self.top_k, self.top_p
        claims = {f"temperature={t}: must be positive and finite": 0 < t < math.inf}
        claims[f"top_k={k}: must be at least 1"] = k is None or k >= 1
        claims[f"top_p={p}: must be in (0, 1]"] = p is None or 0 < p <= 1
        _require(claims)


class KVCache:
    """Keys and values of the tokens that were read so far, so that a new token costs one position.

    Row b of `kv` (n_layer, 2, B, H, block_size, D) holds `lengths[b]` tokens. Anything beyond them
    is garbage (zeros, or the padding of a shorter row): masked until a real token overwrites it.
    While all rows are of one length, which is usual, a slice is written and little is masked.
    """

    def __init__(self, config: GPTConfig, batch_size: int, length: int, like: Tensor) -> None:
        D = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch_size, config.n_head, length, D)
        self.kv = torch.zeros(shape, device=like.device, dtype=like.dtype)
        self.rows = torch.arange(batch_size, device=like.device)[:, None]  # (B, 1)
        self.lengths = torch.zeros_like(self.rows[:, 0])  # (B,)
        self.longest = 0  # max(lengths), on the host: slicing by it waits for no device
        self.is_even = True  # all rows hold `longest` tokens

    def begin(self, t: int) -> Tensor:
        """Positions, (t,) or (B, t), of the next t tokens; sets what they may attend to."""
        room = self.kv.size(4) - self.longest  # the cache's length less what the longest row holds
        _require({f"{t} more tokens were given, but only {room} fit into the cache": t <= room})
        self.width = self.longest + t  # no row has a key at or beyond this column
        columns = torch.arange(self.width, device=self.kv.device)
        if self.is_even:
            self.positions = columns[self.longest :]  # (t,)
            self.mask = columns <= self.positions[:, None] if t > 1 else None  # (t, width)
        else:
            self.positions = self.lengths[:, None] + columns[:t]  # (B, t)
            self.mask = (columns <= self.positions[..., None])[:, None]  # (B, 1, t, width)
        return self.positions

    def extend(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Writes kv (B, t, 2, H, D) at each row's own positions; returns all keys and values."""
        memory = self.kv[layer]  # (2, B, H, block_size, D)
        if self.is_even:
            memory[:, :, :, self.longest : self.width] = kv.permute(2, 0, 3, 1, 4)
        else:
            memory[:, self.rows, :, self.positions] = kv.to(memory.dtype)
        keys, values = memory[:, :, :, : self.width]  # (B, H, width, D) each
        return keys, values

    def commit(self, t: int, lengths: Tensor | None) -> None:
        """Each row keeps the first `lengths[b]` (none given: all) of the t tokens just written."""
        self.is_even &= lengths is None
        self.lengths = self.lengths + (t if lengths is None else lengths)
        self.longest = self.longest + t if lengths is None else int(self.lengths.max())


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.scale = config.attention_mult / math.sqrt(config.n_embd // config.n_head)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, T, D) each
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale
            )
        else:
            k, v = cache.extend(layer, qkv[:, :, 1:])
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask, scale=self.scale)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
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

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): pre-norm transformer decoder with learned positions.

    A tied model has no `lm_head`: the token embedding is the head, one tensor, saved once.
    """

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
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's init: N(0, 0.02²); 0.02 / sqrt(2 n_layer) where a block adds to the residual.

        Both times `init_mult` in the matrices of the blocks.
        """
        std = 0.02 * self.config.init_mult
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(std=std / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                parameter.normal_(std=std if ".h." in name else 0.02)
            else:  # LayerNorm gains are 1, every bias is 0
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, return_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, T, V) of idx (B, T), and the mean cross-entropy in nats of scored targets.

        Training wants no logits: they would stay in memory until the next ones, and a compiled
        backward would fill their gradient with zeros.
        Raises ValueError if idx is longer than block_size.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"got {T} tokens a row, but block_size is {self.config.block_size}")
        hidden = self._hidden(idx, torch.arange(T, device=idx.device))
        logits, loss = self.logits(hidden), None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        return logits if return_logits or loss is None else None, loss

    def _hidden(self, idx: Tensor, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final hidden states (B, T, C) of tokens idx (B, T) at positions (T,) or (B, T)."""
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache, layer)
        return self.transformer.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V): the one output head of training, evaluation and generation."""
        tied = self.config.tie_weights
        logits = tied_head(hidden, self.transformer.wte.weight) if tied else self.lm_head(hidden)
        return logits if self.config.logits_mult == 1 else logits * self.config.logits_mult

    def make_cache(self, batch_size: int, length: int | None = None) -> KVCache:
        """An empty cache of `length` positions (none given: block_size), on the model's device."""
        length = self.config.block_size if length is None else length
        return KVCache(self.config, batch_size, length, like=self.transformer.wte.weight)

    @torch.no_grad()
    def step(self, idx: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, t, V) of t more tokens idx (B, t) a row, read at each row's own position.

        Rows with fewer than t tokens are padded on the right with any id: `lengths` (B,) says how
        many are real (none given: all), and logits at padding mean nothing. The cache advances.
        Raises ValueError if t tokens, padding included, do not fit into block_size.
        """
        return self.logits(self._read(idx, cache, lengths))

    def _read(self, idx: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        hidden = self._hidden(idx, cache.begin(idx.size(1)), cache)  # (B, t, C)
        cache.commit(idx.size(1), lengths)
        return hidden

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        generator: torch.Generator | None = None,
        stop_token: int | None = None,
        **sampling: Any,  # the fields of `Sampling`
    ) -> list[list[int]]:
        """New tokens of each prompt: `max_new_tokens`, or fewer if `stop_token` (kept) ends them.

        The random numbers, one per row and step, are drawn before the first step and row by row.
        So batches that share one CPU generator give the same samples whatever the batch size, up to
        rounding of the logits; and two models that get the same seed get the same numbers.
        Raises ValueError if a setting means nothing, or if a prompt is empty, holds an unknown id,
        or leaves no room for `max_new_tokens`.
        """
        how = Sampling(**sampling)
        self._check_prompts(prompts, max_new_tokens)
        shape, device = (len(prompts), max_new_tokens), generator.device if generator else "cpu"
        uniforms = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
        with eval_mode(self):
            tokens = self._generate(prompts, uniforms, stop_token, how).tolist()  # (B, steps)
        return [row[: row.index(stop_token) + 1] if stop_token in row else row for row in tokens]

    def _generate(
        self, prompts: Sequence[Sequence[int]], uniforms: Tensor, stop: int | None, how: Sampling
    ) -> Tensor:
        """Reads the prompts, then one token a step for all rows; a row that stopped repeats it."""
        longest = max(map(len, prompts))
        cache = self.make_cache(len(prompts), longest + uniforms.size(1))
        device = cache.kv.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        is_ragged = min(map(len, prompts)) < longest
        ids = torch.tensor(padded, device=device)  # (B, t)
        hidden = self._read(ids, cache, lengths if is_ragged else None)  # (B, t, C)
        hidden = hidden[cache.rows[:, 0], lengths - 1]  # (B, C)
        tokens: list[Tensor] = []  # (B,) each
        for u in uniforms.to(device).unbind(1):
            if tokens:
                hidden = self._read(tokens[-1][:, None], cache)[:, 0]
            new = sample_tokens(self.logits(hidden), u, how)
            if stop is not None and tokens:
                new = new.masked_fill(tokens[-1] == stop, stop)
            tokens.append(new)
            if stop is not None and bool((new == stop).all()):
                break
        return torch.stack(tokens, dim=1)

    def _check_prompts(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        V, longest = self.config.vocab_size, max(map(len, prompts), default=0)
        room = self.config.block_size - longest
        empty = [row for row, prompt in enumerate(prompts) if not prompt]
        unknown = [row for row, prompt in enumerate(prompts) if any(not 0 <= i < V for i in prompt)]
        claims = {"no prompts were given": len(prompts) > 0}
        claims[f"prompts {empty} are empty: start them with end-of-text"] = not empty
        claims[f"prompts {unknown} hold ids that are not in the vocabulary [0, {V})"] = not unknown
        claims[f"max_new_tokens={max_new_tokens}: must be at least 1"] = max_new_tokens >= 1
        claims[
            f"max_new_tokens={max_new_tokens}: the longest prompt has {longest} tokens, so "
            f"{max(room, 0)} new tokens fit into block_size={self.config.block_size}"
        ] = max_new_tokens <= room
        _require(claims)

    def n_parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Operations of forward and backward per token, 6 N + 12 L C T (PaLM, appendix B).

        N: weights that multiply activations, so not the embeddings that are only looked up.
        12 L C T: attention over T = block_size tokens; causality is not deducted.
        """
        config, N = self.config, self.n_parameters() - self.transformer.wpe.weight.numel()
        if not config.tie_weights:
            N -= self.transformer.wte.weight.numel()
        return 6 * N + 12 * config.n_layer * config.n_embd * config.block_size


def tied_head(hidden: Tensor, W: Tensor) -> Tensor:  # (..., C), (V, C) -> (..., V)
    """hidden Wᵀ; of many tokens on a GPU over whole tiles, which GPT-2's 50,257 ids do not fill."""
    if W.is_cuda and len(W) % TILE and hidden.numel() >= 1024 * W.size(1):
        return aligned_linear(hidden, W)
    return F.linear(hidden, W)


def aligned_linear(x: Tensor, W: Tensor) -> Tensor:  # (..., C), (V, C) -> (..., V)
    """F.linear with rows of zeros below W up to a multiple of TILE, whose outputs are cut off."""
    return F.linear(x, F.pad(W, (0, 0, 0, -len(W) % TILE)))[..., : len(W)]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, in the mode that it had before outside."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def sample_tokens(logits: Tensor, uniforms: Tensor, how: Sampling) -> Tensor:
    """Next tokens (B,) of logits (B, V), by inversion: the first whose cumulative p exceeds u.

    uniforms: (B,) float64 in [0, 1), on the logits' device; equal ones are common random numbers.
    """
    if how.greedy:
        return logits.argmax(dim=-1)
    values, ids, V = logits.float() / how.temperature, None, logits.size(-1)
    if how.top_k is not None or how.top_p is not None:
        values, ids = values.topk(min(how.top_k or V, V), dim=-1)  # likeliest first
    p = values.softmax(dim=-1)
    cdf = p.cumsum(dim=-1, dtype=torch.float64)
    if how.top_p is not None:
        cdf = (p * (cdf - p < how.top_p)).cumsum(dim=-1, dtype=torch.float64)
    target = uniforms[:, None] * cdf[:, -1:]  # below the last value of cdf, as u < 1
    chosen = torch.searchsorted(cdf, target, right=True)  # (B, 1)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0]


def _require(claims: dict[str, bool]) -> None:
    """One ValueError with every message whose claim is false."""
    problems = [message for message, holds in claims.items() if not holds]
    if problems:
        raise ValueError("\n".join(problems))
