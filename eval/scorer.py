"""Compute log-likelihoods and continuations of texts as lm-evaluation-harness defines them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.tokenizer import Tokenizer
from eval.generate import generate
from model import GPT, eval_mode

Ids = list[int]
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # the harness accepts all three


class Scorer:
    """Answer the harness's three kinds of requests for a GPT and its tokenizer.

    Log-likelihoods are sums over tokens in nats, computed in float64. A text that is too long for
    block_size is truncated on the left.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.device = next(model.parameters()).device
        self.n_truncated = 0  # texts truncated so far

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Score pairs (context, continuation).

        Returns:
            For each pair, log p(continuation | context) and whether greedy decoding yields the
            continuation.
        Raises:
            ValueError: a continuation has no token or more than block_size tokens. It is raised
                before any scoring.
        """
        encoded = [self.encode_pair(*pair) for pair in pairs]
        T = self.model.config.block_size
        for pair, (_, continuation) in zip(pairs, encoded, strict=True):
            if not 1 <= len(continuation) <= T:
                raise ValueError(
                    f"continuation {pair[1][:60]!r} has {len(continuation)} tokens; "
                    f"this model can score 1 to block_size={T} tokens"
                )
        self.n_truncated += sum(len(a) + len(b) > T + 1 for a, b in encoded)
        return self._score(encoded)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Return log p(text) for each text, where every token is predicted exactly once.

        A text is scored in windows of block_size targets. The last window has fewer targets and
        gets earlier tokens as additional context, as in the harness's `get_rolling_token_windows`
        with context_len=1. An empty text has log p = 0.
        """
        T, windows, owners = self.model.config.block_size, [], []
        for owner, text in enumerate(texts):
            ids = [self.tokenizer.eot, *self.tokenizer.encode(text)]
            for start in range(1, len(ids), T):
                windows.append((ids[:start], ids[start : start + T]))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, (value, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Continue each context and cut the result before the first of its stop strings.

        Args:
            requests: pairs (context, generation settings) in the harness's format.
        Raises:
            ValueError: a generation setting is unknown, or the requested length leaves no room for
                a context. It is raised before any generation.
        """
        plans = [self._plan(settings) for _, settings in requests]
        texts = [""] * len(requests)
        rows_of_plan: dict[str, list[int]] = {}
        for row, plan in enumerate(plans):
            rows_of_plan.setdefault(repr(plan), []).append(row)
        for rows in rows_of_plan.values():
            for part in _batches(rows, self.batch_size):
                contexts = [requests[row][0] for row in part]
                for row, text in zip(part, self._generate(contexts, *plans[part[0]]), strict=True):
                    texts[row] = text
        return texts

    def encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Return the ids of context and continuation, split as `TemplateLM._encode_pair` does.

        Trailing spaces of the context are moved to the continuation. The ids of the continuation
        are those of the joined text from position len(context ids) on. An empty context is replaced
        by end-of-text.
        """
        if not context:
            return [self.tokenizer.eot], self.tokenizer.encode(continuation)
        stripped = context.rstrip()
        whole = self.tokenizer.encode(context + continuation)
        ids = self.tokenizer.encode(stripped)
        return ids or [self.tokenizer.eot], whole[len(ids) :]

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """Score encoded pairs in batches.

        The longest pairs come first, so that batches contain little padding and the first batch
        needs the most memory.
        """
        T = self.model.config.block_size
        rows = [(context + continuation)[-(T + 1) :] for context, continuation in pairs]
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        scores = [(0.0, True)] * len(rows)
        batches = list(_batches(order, self.batch_size))
        with eval_mode(self.model):
            for part in tqdm(batches, desc="scoring", disable=None):
                logits = self._logits([rows[row][:-1] for row in part])  # (B, t, V)
                for row, each in zip(part, logits, strict=True):
                    end, n = len(rows[row]) - 1, len(pairs[row][1])
                    scores[row] = _score_row(each[end - n : end], pairs[row][1])
        return scores

    def _logits(self, rows: list[Ids]) -> Tensor:  # (B, t, V)
        """Pad the rows on the right, which does not affect a causal model's logits before it."""
        longest = max(map(len, rows))
        padded = [row + [0] * (longest - len(row)) for row in rows]
        return self.model(torch.tensor(padded, device=self.device))[0]

    def _plan(self, settings: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """Translate generation settings to (stop strings, new tokens, fields of `Sampling`)."""
        given, T = dict(settings), self.model.config.block_size
        until = given.pop("until", None) or []
        lengths = [n for key in LENGTH_KEYS if (n := given.pop(key, None)) is not None]
        length = int(lengths[0]) if lengths else min(256, (T + 1) // 2)
        temperature = given.pop("temperature", None)
        greedy = not given.pop("do_sample", bool(temperature))
        how = {key: given.pop(key) for key in ("top_k", "top_p") if key in given}
        if given:
            raise ValueError(f"generation settings {sorted(given)} are not supported")
        if not 1 <= length < T:
            raise ValueError(
                f"{length} new tokens leave no room for a context in block_size={T}; set "
                f"max_gen_toks in the task's generation_kwargs to a value from 1 to {T - 1}"
            )
        how |= {"greedy": greedy} if greedy else {"temperature": temperature or 1.0}
        return [until] if isinstance(until, str) else list(until), length, how

    def _generate(
        self, contexts: list[str], until: list[str], length: int, how: dict[str, Any]
    ) -> Iterator[str]:
        room, eot = self.model.config.block_size - length, self.tokenizer.eot
        encoded = [self.tokenizer.encode(context) or [eot] for context in contexts]
        self.n_truncated += sum(len(ids) > room for ids in encoded)
        prompts = [ids[-room:] for ids in encoded]
        for ids in generate(self.model, prompts, length, stop_token=eot, **how):
            text = self.tokenizer.decode(ids[:-1] if ids[-1] == eot else ids)
            yield text[: min((text.find(stop) for stop in until if stop in text), default=None)]


def _score_row(logits: Tensor, targets: Ids) -> tuple[float, bool]:  # (n, V)
    """Return the summed log p of n targets and whether each is the likeliest token."""
    ids = torch.tensor(targets, device=logits.device)
    log_p = logits.double().log_softmax(-1).gather(1, ids[:, None])
    return log_p.sum().item(), bool((logits.argmax(-1) == ids).all())


def _batches(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
