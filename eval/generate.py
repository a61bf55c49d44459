"""Generate tokens from a GPT with a key-value cache."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.sampling import Sampling, sample_tokens, wide_device
from model import GPT, CausalSelfAttention, eval_mode, require

MKL_DTYPES = (torch.float32, torch.float64)


class KVCache:
    """Keys and values of the tokens read so far, so that a new token costs one position.

    Row b of `kv` (n_layer, 2, B, H, length, D) holds `lengths[b]` tokens. The entries beyond them
    are zeros or the padding of a shorter row; they are masked until a token overwrites them. While
    all rows have one length, the usual case, a slice is written and little is masked.

    Args:
        length: positions of a row. Defaults to the model's block_size.
    """

    def __init__(self, model: GPT, batch_size: int, length: int | None = None) -> None:
        config, like = model.config, next(model.parameters())
        D, length = config.n_embd // config.n_head, config.block_size if length is None else length
        shape = (config.n_layer, 2, batch_size, config.n_head, length, D)
        self.kv = torch.zeros(shape, device=like.device, dtype=like.dtype)
        self.rows = torch.arange(batch_size, device=like.device)[:, None]  # (B, 1)
        self.lengths = torch.zeros_like(self.rows[:, 0])  # (B,)
        self.longest = 0  # max(lengths) on the host, so that slicing does not wait for the device
        self.is_even = True  # whether all rows hold `longest` tokens

    def begin(self, t: int) -> Tensor:
        """Return the positions, (t,) or (B, t), of the next t tokens, and set their mask."""
        room = self.kv.size(4) - self.longest
        require({f"{t} more tokens were given, but only {room} fit into the cache": t <= room})
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
        """Write kv (B, t, 2, H, D) at each row's own positions; return all keys and values."""
        memory = self.kv[layer]  # (2, B, H, length, D)
        if self.is_even:
            memory[:, :, :, self.longest : self.width] = kv.permute(2, 0, 3, 1, 4)
        else:
            memory[:, self.rows, :, self.positions] = kv.to(memory.dtype)
        keys, values = memory[:, :, :, : self.width]  # (B, H, width, D) each
        return keys, values

    def commit(self, t: int, lengths: Tensor | None) -> None:
        """Keep the first `lengths[b]` of the t tokens just written to row b; all t if None."""
        self.is_even &= lengths is None
        self.lengths = self.lengths + (t if lengths is None else lengths)
        self.longest = self.longest + t if lengths is None else int(self.lengths.max())


@torch.no_grad()
def next_logits(model: GPT, idx: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
    """Read t more tokens idx (B, t) into the cache and return their logits (B, t, V).

    Args:
        lengths: (B,) number of real tokens in each row of idx; the rest is padding on the right
            with any id, whose logits mean nothing. Defaults to t for every row.
    Raises:
        ValueError: t tokens, padding included, do not fit into the cache.
    """
    return _head(model, _read(model, idx, cache, lengths).flatten(0, 1)).unflatten(0, idx.shape)


def _read(model: GPT, idx: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
    """Read tokens idx (B, t) into the cache and return their final hidden states (B, t, C).

    Computes what `GPT.forward` does before the head, without dropout. Hooks and replaced forwards
    of the modules do not run.
    """
    parts: Any = model.transformer
    x = (parts.wte(idx) + parts.wpe(cache.begin(idx.size(1)))).flatten(0, 1)  # (B t, C)
    for layer, block in enumerate(parts.h):
        x = x + _attend(block.attn, block.ln_1(x), cache, layer, idx.shape)
        fc, proj = block.mlp.c_fc, block.mlp.c_proj
        h = F.gelu(linear(block.ln_2(x), fc.weight, fc.bias), approximate="tanh")  # (B t, 4 C)
        x = x + linear(h, proj.weight, proj.bias)
    cache.commit(idx.size(1), lengths)
    return parts.ln_f(x).unflatten(0, idx.shape)


def _attend(
    attn: CausalSelfAttention, x: Tensor, cache: KVCache, layer: int, shape: torch.Size
) -> Tensor:
    """Return the attention of new tokens x (B t, C) to themselves and to those in the cache.

    Args:
        shape: (B, t).
    """
    D = x.size(1) // attn.n_head
    qkv = linear(x, attn.c_attn.weight, attn.c_attn.bias).contiguous()  # (B t, 3 C)
    q, kv = qkv.view(*shape, 3, attn.n_head, D).split([1, 2], dim=2)
    keys, values = cache.extend(layer, kv)
    y = F.scaled_dot_product_attention(
        q.squeeze(2).transpose(1, 2), keys, values, attn_mask=cache.mask, scale=attn.scale
    )  # (B, H, t, D)
    return linear(y.transpose(1, 2).reshape(x.shape), attn.c_proj.weight, attn.c_proj.bias)


def _head(model: GPT, hidden: Tensor) -> Tensor:  # (n, C) -> (n, V)
    """Apply the output head: `GPT.logits`, on a CPU by `linear`."""
    if not hidden.is_cpu:
        return model.logits(hidden)
    head: Any = model.transformer.wte if model.config.tie_weights else model.lm_head
    logits = linear(hidden, head.weight)
    return logits if model.config.logits_mult == 1 else logits * model.config.logits_mult


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:  # (n, K), (N, K) -> (n, N)
    """Return F.linear(x, W, b), up to rounding, in a form that suits few rows on a CPU.

    MKL multiplies x Wᵀ slowly if x has few rows. W xᵀ takes 0.6 to 0.9 of the time for 8 to 48
    rows, but its result is a transposed view, which slows down what follows; for more rows this
    costs more than it saves. Products of x with every 64 rows of W take 0.7 of the time for 4 to 7
    rows and a large W; see docs/log/2026-11-21-generation.md.
    """
    n, (N, K) = len(x), W.shape
    if not (x.is_cpu and torch.backends.mkl.is_available() and W.dtype in MKL_DTYPES):
        return F.linear(x, W, b)
    if n == 1 or 8 <= n < 64:
        y = (W @ x.t()).t()
    elif 4 <= n < 8 and N % 64 == 0:
        blocks = W.unflatten(0, (-1, 64)).mT  # (N / 64, K, 64)
        y = torch.bmm(x.expand(len(blocks), n, K), blocks).transpose(0, 1).reshape(n, N)
    else:
        return F.linear(x, W, b)
    return y if b is None else y.add_(b)


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    **sampling: Any,
) -> list[list[int]]:
    """Return up to `max_new_tokens` new tokens for each prompt.

    A row whose context has reached block_size tokens continues from its last block_size // 2 tokens
    (at least 1), which move to the first positions.

    The random numbers, one for each row and step, are drawn before the first step and row by row.
    Batches that share one CPU generator therefore give the same samples whatever the batch size, up
    to rounding of the logits, and two models with the same seed see the same numbers.

    Args:
        stop_token: ends a row; it is kept as the row's last token.
        sampling: the fields of `Sampling`.
    Raises:
        ValueError: a sampling field is out of range, or a prompt is empty, holds an unknown id, or
            is longer than block_size.
    """
    how = Sampling(**sampling)
    _check_prompts(model, prompts, max_new_tokens)
    shape, device = (len(prompts), max_new_tokens), generator.device if generator else "cpu"
    uniforms = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    with eval_mode(model):
        tokens = _generate(model, prompts, uniforms, stop_token, how).tolist()  # (B, steps)
    return [row[: row.index(stop_token) + 1] if stop_token in row else row for row in tokens]


def _generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    stop: int | None,
    how: Sampling,
) -> Tensor:  # (B, steps)
    """Read the prompts, then draw one token a step for all rows. A stopped row repeats `stop`."""
    T, length = model.config.block_size, max(map(len, prompts)) + uniforms.size(1)
    starts, tokens = [0] * len(prompts), []  # where each row's context begins; (B,) each
    hidden, cache = _read_rows(model, prompts, min(length, T))
    for u in uniforms.to(wide_device(hidden.device)).unbind(1):
        lengths = [len(row) + len(tokens) - s for row, s in zip(prompts, starts, strict=True)]
        if max(lengths) > T:
            starts = [
                s + n - max(T // 2, 1) if n > T else s for s, n in zip(starts, lengths, strict=True)
            ]
            new = torch.stack(tokens, dim=1).tolist()
            rows = zip(prompts, new, starts, strict=True)
            hidden, cache = _read_rows(model, [[*old, *more][s:] for old, more, s in rows], T)
        elif tokens:
            hidden = _read(model, tokens[-1][:, None], cache)[:, 0]
        token = sample_tokens(_head(model, hidden), u, how)
        if stop is not None and tokens:
            token = token.masked_fill(tokens[-1] == stop, stop)
        tokens.append(token)
        if stop is not None and bool((token == stop).all()):
            break
    return torch.stack(tokens, dim=1)


def _read_rows(
    model: GPT, rows: Sequence[Sequence[int]], length: int
) -> tuple[Tensor, KVCache]:  # (B, C)
    """Read rows of different lengths into a new cache; return their last hidden states, too."""
    cache, longest = KVCache(model, len(rows), length), max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows], device=cache.kv.device)  # (B,)
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    ids = torch.tensor(padded, device=cache.kv.device)  # (B, t)
    is_ragged = min(map(len, rows)) < longest
    hidden = _read(model, ids, cache, lengths if is_ragged else None)  # (B, t, C)
    return hidden[cache.rows[:, 0], lengths - 1], cache


def _check_prompts(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    V, T = model.config.vocab_size, model.config.block_size
    empty = [row for row, prompt in enumerate(prompts) if not prompt]
    unknown = [row for row, prompt in enumerate(prompts) if any(not 0 <= i < V for i in prompt)]
    claims = {"no prompts were given": len(prompts) > 0}
    claims[f"prompts {empty} are empty: start them with end-of-text"] = not empty
    claims[f"prompts {unknown} hold ids that are not in the vocabulary [0, {V})"] = not unknown
    claims[f"max_new_tokens={max_new_tokens}: must be at least 1"] = max_new_tokens >= 1
    long = [row for row, prompt in enumerate(prompts) if len(prompt) > T]
    claims[f"prompts {long} have more than block_size={T} tokens: shorten them"] = not long
    require(claims)
