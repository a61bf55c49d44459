"""Log-likelihoods and continuations of texts, in the conventions of lm-evaluation-harness."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.tokenizer import Tokenizer
from model import GPT, eval_mode

Ids = list[int]
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # the harness's names for one thing


class Scorer:
    """What the harness asks of a model, on texts. Sums over tokens are in nats, float64."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.device = next(model.parameters()).device
        self.n_truncated = 0  # texts that lost their beginning so far

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding yields it) of each pair.

        Raises ValueError before any work if a continuation has no token of its own, or more than
        block_size.
        """
        encoded = [self.encode_pair(*pair) for pair in pairs]
        T = self.model.config.block_size
        for pair, (_, continuation) in zip(pairs, encoded, strict=True):
            if not 1 <= len(continuation) <= T:
                raise ValueError(
                    f"continuation {pair[1][:60]!r} has {len(continuation)} tokens of its own; "
                    f"this model can score 1 to block_size={T}"
                )
        self.n_truncated += sum(len(a) + len(b) > T + 1 for a, b in encoded)
        return self._score(encoded)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """log p(text) of each text, every token predicted once.

        Windows of block_size targets; the last one reaches back for a full context (the harness's
        `get_rolling_token_windows` with context_len=1). An empty text has log p = 0.
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
        """A continuation of each context, cut before the first of its stop strings.

        Raises ValueError before any work about a setting that is unknown or leaves no room.
        """
        plans = [self._plan(settings) for _, settings in requests]
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for row, plan in enumerate(plans):
            alike.setdefault(repr(plan), []).append(row)
        for rows in alike.values():
            for part in _batches(rows, self.batch_size):
                contexts = [requests[row][0] for row in part]
                for row, text in zip(part, self._generate(contexts, *plans[part[0]]), strict=True):
                    texts[row] = text
        return texts

    def encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Ids of both, cut as the harness cuts (`TemplateLM._encode_pair`).

        Spaces that end the context go to the continuation, whose ids are those of the whole text
        beyond the context's number of ids. An empty context is end-of-text.
        """
        if not context:
            return [self.tokenizer.eot], self.tokenizer.encode(continuation)
        stripped = context.rstrip()
        whole = self.tokenizer.encode(context + continuation)
        ids = self.tokenizer.encode(stripped)
        return ids or [self.tokenizer.eot], whole[len(ids) :]

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """Longest first, so that a batch holds little padding and the first needs most memory."""
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
                    scores[row] = _grade(each[end - n : end], pairs[row][1])
        return scores

    def _logits(self, rows: list[Ids]) -> Tensor:  # (B, t, V)
        """Rows are padded on the right, where a causal model's real tokens do not look."""
        longest = max(map(len, rows))
        padded = [row + [0] * (longest - len(row)) for row in rows]
        return self.model(torch.tensor(padded, device=self.device))[0]

    def _plan(self, settings: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """Stop strings, number of new tokens, and the fields of `Sampling`."""
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
                f"max_gen_toks in the task's generation_kwargs to 1 to {T - 1}"
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
        for ids in self.model.generate(prompts, length, stop_token=eot, **how):
            text = self.tokenizer.decode(ids[:-1] if ids[-1] == eot else ids)
            yield text[: min((text.find(stop) for stop in until if stop in text), default=None)]


def _grade(logits: Tensor, targets: Ids) -> tuple[float, bool]:  # (n, V)
    wanted = torch.tensor(targets, device=logits.device)
    log_p = logits.double().log_softmax(-1).gather(1, wanted[:, None])
    return log_p.sum().item(), bool((logits.argmax(-1) == wanted).all())


def _batches(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
