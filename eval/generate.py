"""Generate tokens from a GPT with a key-value cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model import GPT, eval_mode, require


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw the next token. The defaults sample from the model's own distribution.

    Raises ValueError for values out of range.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # keep only the k likeliest tokens
    top_p: float | None = None  # keep the fewest likeliest tokens with this total probability
    greedy: bool = False  # take the likeliest token and ignore the other fields

    def __post_init__(self) -> None:
        t, k, p = self.temperature, self.top_k, self.top_p
        claims = {f"temperature={t}: must be finite and not negative": 0 <= t < math.inf}
        claims[f"top_k={k}: must be at least 1"] = k is None or k >= 1
        claims[f"top_p={p}: must be in (0, 1]"] = p is None or 0 < p <= 1
        require(claims)


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
    return model.logits(_read(model, idx, cache, lengths))


def _read(model: GPT, idx: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
    """Read tokens idx (B, t) into the cache and return their hidden states (B, t, C)."""
    hidden = model.hidden(idx, cache.begin(idx.size(1)), cache)
    cache.commit(idx.size(1), lengths)
    return hidden


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
        token = sample_tokens(model.logits(hidden), u, how)
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


def wide_device(device: str | torch.device) -> torch.device:
    """Return the device for float64 numbers beside this one: the same, or the CPU for MPS."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def sample_tokens(logits: Tensor, uniforms: Tensor, how: Sampling) -> Tensor:
    """Draw the next tokens (B,) from logits (B, V) by inverting the cumulative distribution.

    Args:
        uniforms: (B,) float64 in [0, 1), on `wide_device(logits.device)`. Two models that get the
            same numbers are compared with common random numbers.
    """
    if how.greedy or how.temperature == 0:
        return logits.argmax(dim=-1)
    values, ids = logits.float().to(wide_device(logits.device)) / how.temperature, None
    V = logits.size(-1)
    if how.top_k is not None or how.top_p is not None:
        values, ids = values.topk(min(how.top_k or V, V), dim=-1)  # likeliest first
    p = values.softmax(dim=-1)
    cdf = p.cumsum(dim=-1, dtype=torch.float64)
    if how.top_p is not None:
        cdf = (p * (cdf - p < how.top_p)).cumsum(dim=-1, dtype=torch.float64)
    target = uniforms[:, None] * cdf[:, -1:]  # below the last value of cdf, as u < 1
    chosen = torch.searchsorted(cdf, target, right=True)  # (B, 1)
    return (chosen if ids is None else ids.gather(-1, chosen))[:, 0].to(logits.device)
